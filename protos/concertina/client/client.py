"""The clients, for blocking and for asyncio code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, Unpack

import grpc

from concertina.client.channel import Access, Tls
from concertina.client.completions import Completion
from concertina.client.connection import AsyncConnection, Connection
from concertina.client.events import Cursor
from concertina.client.fields import message
from concertina.client.models import Model, Score, TokenList, model_from, score_from, token_list
from concertina.client.parameters import GenerateParameters, check_parameters
from concertina.client.requests import PromptLike, score_request, tokenize_request
from concertina.client.resuming import DEFAULT_KEEP_S, begin, take_up
from concertina.client.sessions import AsyncSessions, Sessions
from concertina.client.streams import AsyncStream, Stream
from concertina.v1 import model_service_pb2

DEFAULT_ADDRESS = "127.0.0.1:9000"


class Client:
    """Calls one server from blocking code, over one connection. Threads may share it.

    key: the API key, if the server needs one; by default the variable CONCERTINA_KEY.
    tls: how to use TLS, if the server does; Tls() trusts the authorities that gRPC comes with.
    sessions: the streams that the server keeps.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, key: str | None = None, tls: Tls | None = None
    ) -> None:
        self.address = address
        self._connection = Connection(address, Access(key, tls))
        self.sessions = Sessions(self._connection)

    def generate(
        self,
        prompt: PromptLike | None = None,
        *,
        timeout: float | None = None,
        keep: float | None = None,
        resume_for: float | None = None,
        **parameters: Unpack[GenerateParameters],
    ) -> Stream:
        """Starts a stream. Iterate over it for its events.

        It resumes by itself when its connection or its server is lost: see docs/api.md.

        prompt: what the stream continues: text, token ids, PNG or RGB bytes, a Pillow image or a
            NumPy array.
        timeout: seconds after which the stream is given up with DeadlineExceeded.
        keep: seconds that the server keeps the stream while nobody reads it, and after its end,
            for `sessions`. By default it is kept for 60 seconds while it runs, and forgotten when
            it ends. 0: it ends with its connection.
        resume_for: seconds without any event after which a lost stream is given up with StreamCut.
            Default: `keep`.
        parameters: see GenerateParameters.
        """
        return Stream(
            self._connection,
            begin(self.address, prompt, parameters, timeout, keep, resume_for),
        )

    def complete(
        self,
        prompt: PromptLike | None = None,
        *,
        timeout: float | None = None,
        keep: float | None = None,
        resume_for: float | None = None,
        **parameters: Unpack[GenerateParameters],
    ) -> Completion:
        """A whole stream, once it has ended: the text is `complete(…).text`."""
        check_parameters("complete", parameters)
        stream = self.generate(
            prompt, timeout=timeout, keep=keep, resume_for=resume_for, **parameters
        )
        return stream.complete()

    def resume(
        self,
        stream_id: str,
        received: Sequence[Cursor] = (),
        *,
        timeout: float | None = None,
        resume_for: float = DEFAULT_KEEP_S,
    ) -> Stream:
        """The rest of a kept stream that another client began; its first event is Accepted.

        Whoever reads it now gets StreamCut. What `generate` says about `timeout`, `resume_for` and
        leaving early holds here, too.

        received: what has arrived of each output; one that is not named is sent from its beginning.
        """
        return Stream(
            self._connection, take_up(self.address, stream_id, received, timeout, resume_for)
        )

    def score(
        self,
        prompt: PromptLike,
        *,
        model: str = "",
        label: str | None = None,
        timeout: float | None = None,
    ) -> Score:
        """The bits that the model needs for each token of the prompt. Generates nothing."""
        request = score_request(prompt, model, label)
        try:
            return score_from(self._connection.generation.Score(request, timeout=timeout))
        except grpc.RpcError as error:
            raise self._connection.error(error) from None

    def tokenize(
        self,
        prompt: PromptLike,
        *,
        model: str = "",
        timeout: float | None = None,
    ) -> TokenList:
        """The tokens that the model takes a prompt for, however long. Generates nothing."""
        request = tokenize_request(prompt, model)
        try:
            response = self._connection.models.Tokenize(request, timeout=timeout)
        except grpc.RpcError as error:
            raise self._connection.error(error) from None
        return token_list(response, response.ids)

    def detokenize(
        self, ids: Sequence[int], *, model: str = "", timeout: float | None = None
    ) -> TokenList:
        """What tokens of the model stand for: text, or colours."""
        request = message(model_service_pb2.DetokenizeRequest, model=model, ids=ids)
        try:
            response = self._connection.models.Detokenize(request, timeout=timeout)
        except grpc.RpcError as error:
            raise self._connection.error(error) from None
        return token_list(response, request.ids)

    def models(self, *, timeout: float | None = None) -> list[Model]:
        """All models that are served, ordered by name."""
        request = model_service_pb2.ListModelsRequest()
        try:
            response = self._connection.models.ListModels(request, timeout=timeout)
        except grpc.RpcError as error:
            raise self._connection.error(error) from None
        return [model_from(model) for model in response.models]

    def model(self, name: str = "", *, timeout: float | None = None) -> Model:
        """One model; without a name, the only one that is served."""
        request = message(model_service_pb2.GetModelRequest, model=name)
        try:
            return model_from(self._connection.models.GetModel(request, timeout=timeout).model)
        except grpc.RpcError as error:
            raise self._connection.error(error) from None

    def close(self) -> None:
        """Closes the connection; open streams are cancelled."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncClient:
    """Calls one server from asyncio code, as Client does, over one connection."""

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, key: str | None = None, tls: Tls | None = None
    ) -> None:
        self.address = address
        self._connection = AsyncConnection(address, Access(key, tls))
        self.sessions = AsyncSessions(self._connection)

    def generate(
        self,
        prompt: PromptLike | None = None,
        *,
        timeout: float | None = None,
        keep: float | None = None,
        resume_for: float | None = None,
        **parameters: Unpack[GenerateParameters],
    ) -> AsyncStream:
        """Starts a stream, as Client.generate does. Iterate with `async for`."""
        return AsyncStream(
            self._connection,
            begin(self.address, prompt, parameters, timeout, keep, resume_for),
        )

    async def complete(
        self,
        prompt: PromptLike | None = None,
        *,
        timeout: float | None = None,
        keep: float | None = None,
        resume_for: float | None = None,
        **parameters: Unpack[GenerateParameters],
    ) -> Completion:
        """A whole stream, once it has ended, as Client.complete gives it."""
        check_parameters("complete", parameters)
        stream = self.generate(
            prompt, timeout=timeout, keep=keep, resume_for=resume_for, **parameters
        )
        return await stream.complete()

    def resume(
        self,
        stream_id: str,
        received: Sequence[Cursor] = (),
        *,
        timeout: float | None = None,
        resume_for: float = DEFAULT_KEEP_S,
    ) -> AsyncStream:
        """The rest of a kept stream that another client began, as Client.resume gives it."""
        return AsyncStream(
            self._connection, take_up(self.address, stream_id, received, timeout, resume_for)
        )

    async def score(
        self,
        prompt: PromptLike,
        *,
        model: str = "",
        label: str | None = None,
        timeout: float | None = None,
    ) -> Score:
        """The bits that the model needs for each token of the prompt. Generates nothing."""
        request = score_request(prompt, model, label)
        try:
            return score_from(await self._connection.generation.Score(request, timeout=timeout))
        except grpc.aio.AioRpcError as error:
            raise self._connection.error(error) from None

    async def tokenize(
        self,
        prompt: PromptLike,
        *,
        model: str = "",
        timeout: float | None = None,
    ) -> TokenList:
        """The tokens that the model takes a prompt for, however long. Generates nothing."""
        request = tokenize_request(prompt, model)
        try:
            response = await self._connection.models.Tokenize(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise self._connection.error(error) from None
        return token_list(response, response.ids)

    async def detokenize(
        self, ids: Sequence[int], *, model: str = "", timeout: float | None = None
    ) -> TokenList:
        """What tokens of the model stand for: text, or colours."""
        request = message(model_service_pb2.DetokenizeRequest, model=model, ids=ids)
        try:
            response = await self._connection.models.Detokenize(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise self._connection.error(error) from None
        return token_list(response, request.ids)

    async def models(self, *, timeout: float | None = None) -> list[Model]:
        """All models that are served, ordered by name."""
        request = model_service_pb2.ListModelsRequest()
        try:
            response = await self._connection.models.ListModels(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise self._connection.error(error) from None
        return [model_from(model) for model in response.models]

    async def model(self, name: str = "", *, timeout: float | None = None) -> Model:
        """One model; without a name, the only one that is served."""
        request = message(model_service_pb2.GetModelRequest, model=name)
        try:
            return model_from(
                (await self._connection.models.GetModel(request, timeout=timeout)).model
            )
        except grpc.aio.AioRpcError as error:
            raise self._connection.error(error) from None

    async def close(self) -> None:
        """Closes the connection; open streams are cancelled."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()
