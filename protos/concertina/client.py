"""Typed streams from a Concertina server, in blocking and in asyncio code.

with Client("127.0.0.1:9000") as client, client.generate("def ", seed=1) as stream:
    for event in stream:
        match event:
            case Tokens(text=text):
                print(text, end="", flush=True)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Self, Unpack

import grpc

from concertina.channel import Access, Tls
from concertina.errors import (
    AccessDenied,
    ConcertinaError,
    ContractViolation,
    DeadlineExceeded,
    GenerationFailed,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    ServerError,
    ServerUnavailable,
    StreamCut,
    status_error,
)
from concertina.events import (
    Accepted,
    Event,
    EventReader,
    Finished,
    FinishReason,
    Output,
    PromptLogprobs,
    Sampling,
    Stopping,
    TokenLogprobs,
    Tokens,
    Usage,
)
from concertina.models import ImageFormat, Model, Score, model_from, score_from
from concertina.requests import GenerateParameters, generate_request, score_request
from concertina.v1 import generation_service_pb2, model_service_pb2
from concertina.v1.generation_service_pb2_grpc import GenerationServiceStub
from concertina.v1.model_service_pb2_grpc import ModelServiceStub

if TYPE_CHECKING:
    from concertina.requests import PromptLike

__all__ = [
    "DEFAULT_ADDRESS",
    "Accepted",
    "AccessDenied",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "ConcertinaError",
    "ContractViolation",
    "DeadlineExceeded",
    "Event",
    "FinishReason",
    "Finished",
    "GenerateParameters",
    "GenerationFailed",
    "ImageFormat",
    "InvalidRequest",
    "Model",
    "ModelNotFound",
    "Output",
    "Overloaded",
    "PromptLogprobs",
    "Sampling",
    "Score",
    "ServerError",
    "ServerUnavailable",
    "Stopping",
    "Stream",
    "StreamCut",
    "Tls",
    "TokenLogprobs",
    "Tokens",
    "Usage",
]

DEFAULT_ADDRESS = "127.0.0.1:9000"


class Client:
    """Calls one server from blocking code; may be shared between threads. One connection.

    key: the API key, where the server wants one; without it that of the variable CONCERTINA_KEY.
    tls: how to speak TLS, where the server does; Tls() trusts the authorities gRPC comes with.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, key: str | None = None, tls: Tls | None = None
    ) -> None:
        access = Access(key, tls)
        self.address = address
        self._channel = access.channel(address)
        self._generation = access.keyed(GenerationServiceStub(self._channel))
        self._models = access.keyed(ModelServiceStub(self._channel))

    def generate(
        self,
        prompt: PromptLike | None = None,
        *,
        timeout: float | None = None,
        **parameters: Unpack[GenerateParameters],
    ) -> Stream:
        """Starts a stream. Iterate over it for its events.

        prompt: what the stream continues: text, token ids, a PNG or RGB bytes, a Pillow image.
        timeout: seconds after which the call is given up with DeadlineExceeded.
        parameters: see GenerateParameters.
        """
        request = generate_request(prompt, parameters)
        return Stream(self._generation.Generate(request, timeout=timeout), self.address)

    def score(
        self,
        prompt: PromptLike,
        *,
        model: str = "",
        label: str | None = None,
        timeout: float | None = None,
    ) -> Score:
        """Bits that the model needs for each token of the prompt. Generates nothing."""
        request = score_request(prompt, model, label)
        try:
            return score_from(self._generation.Score(request, timeout=timeout))
        except grpc.RpcError as error:
            raise _call_error(self.address, error) from None

    def models(self, *, timeout: float | None = None) -> list[Model]:
        """Every model served, ordered by name."""
        request = model_service_pb2.ListModelsRequest()
        try:
            response = self._models.ListModels(request, timeout=timeout)
        except grpc.RpcError as error:
            raise _call_error(self.address, error) from None
        return [model_from(model) for model in response.models]

    def model(self, name: str = "", *, timeout: float | None = None) -> Model:
        """One model; without a name the only one served."""
        request = model_service_pb2.GetModelRequest(model=name)
        try:
            return model_from(self._models.GetModel(request, timeout=timeout).model)
        except grpc.RpcError as error:
            raise _call_error(self.address, error) from None

    def close(self) -> None:
        """Closes the connection; open streams are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Stream:
    """The events of one stream, checked against the contract while they are read.

    A context manager: leaving it cancels a stream that still runs. After `cancel` the iteration
    ends without an error.
    """

    def __init__(
        self, call: grpc._CallIterator[generation_service_pb2.GenerateResponse], address: str
    ) -> None:
        self._call = call
        self._reader = EventReader(address)
        self._cancelled = False

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        message, code, details = None, grpc.StatusCode.OK, ""
        try:
            message = None if self._cancelled else next(self._call, None)
        except grpc.RpcError:
            code, details = self._call.code(), self._call.details()
        if self._cancelled:
            raise StopIteration
        if message is None:
            self._reader.end(code, details)
            raise StopIteration
        try:
            return self._reader.read(message)
        except ConcertinaError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Stops the stream; may be called from any thread, and more than once."""
        self._cancelled = True
        self._call.cancel()

    close = cancel

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncClient:
    """Calls one server from asyncio code, as Client does. One connection."""

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, key: str | None = None, tls: Tls | None = None
    ) -> None:
        access = Access(key, tls)
        self.address = address
        self._channel = access.async_channel(address)
        self._generation = access.keyed(GenerationServiceStub(self._channel))
        self._models = access.keyed(ModelServiceStub(self._channel))

    def generate(
        self,
        prompt: PromptLike | None = None,
        *,
        timeout: float | None = None,
        **parameters: Unpack[GenerateParameters],
    ) -> AsyncStream:
        """Starts a stream, as Client.generate does. Iterate with `async for`."""
        request = generate_request(prompt, parameters)
        return AsyncStream(self._generation.Generate(request, timeout=timeout), self.address)

    async def score(
        self,
        prompt: PromptLike,
        *,
        model: str = "",
        label: str | None = None,
        timeout: float | None = None,
    ) -> Score:
        """Bits that the model needs for each token of the prompt. Generates nothing."""
        request = score_request(prompt, model, label)
        try:
            return score_from(await self._generation.Score(request, timeout=timeout))
        except grpc.aio.AioRpcError as error:
            raise _call_error(self.address, error) from None

    async def models(self, *, timeout: float | None = None) -> list[Model]:
        """Every model served, ordered by name."""
        request = model_service_pb2.ListModelsRequest()
        try:
            response = await self._models.ListModels(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise _call_error(self.address, error) from None
        return [model_from(model) for model in response.models]

    async def model(self, name: str = "", *, timeout: float | None = None) -> Model:
        """One model; without a name the only one served."""
        request = model_service_pb2.GetModelRequest(model=name)
        try:
            return model_from((await self._models.GetModel(request, timeout=timeout)).model)
        except grpc.aio.AioRpcError as error:
            raise _call_error(self.address, error) from None

    async def close(self) -> None:
        """Closes the connection; open streams are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()


class AsyncStream:
    """The events of one stream, as Stream gives them, for `async for` and `async with`."""

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[
            generation_service_pb2.GenerateRequest, generation_service_pb2.GenerateResponse
        ],
        address: str,
    ) -> None:
        self._call = call
        self._reader = EventReader(address)
        self._cancelled = False

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        message, code, details = None, grpc.StatusCode.OK, ""
        try:
            message = None if self._cancelled else await self._call.read()
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details() or ""
        except asyncio.CancelledError:
            # grpc.aio reports our own cancel in the same way as the cancellation of this task.
            task = asyncio.current_task()
            if not self._cancelled or (task is not None and task.cancelling()):
                raise
        if self._cancelled:
            raise StopAsyncIteration
        if not isinstance(message, generation_service_pb2.GenerateResponse):
            self._reader.end(code, details)
            raise StopAsyncIteration
        try:
            return self._reader.read(message)
        except ConcertinaError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Stops the stream; may be called more than once."""
        self._cancelled = True
        self._call.cancel()

    async def close(self) -> None:
        """Cancels a stream that still runs."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()


def _call_error(address: str, error: grpc.RpcError) -> ConcertinaError:
    return status_error(address, error.code(), error.details() or "")
