"""The RPCs ListModels, GetModel, Tokenize and Detokenize."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from concertina.v1 import model_service_pb2 as pb
from concertina.v1 import model_service_pb2_grpc as model_grpc
from server.api.context import Context, admitted, answer, find, visible
from server.api.prompt import checked_ids, prompt_ids
from server.auth.api_keys import Callers
from server.bundles.bundle import Bundle
from server.sessions.served_model import ServedModel


class ModelServicer(model_grpc.ModelServiceServicer):
    """See model_service.proto."""

    def __init__(self, models: Mapping[str, ServedModel], callers: Callers) -> None:
        self._models = models
        self._callers = callers

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse | None:
        """All models that the caller may use, ordered by name."""

        async def list_models() -> pb.ListModelsResponse:
            seen = visible(self._models, admitted(self._callers, context, request))
            models = [_model(model) for _, model in sorted(seen.items())]
            return pb.ListModelsResponse(models=models)

        return await answer("ListModels", context, list_models())

    async def GetModel(
        self, request: pb.GetModelRequest, context: Context
    ) -> pb.GetModelResponse | None:
        """One model."""

        async def get_model() -> pb.GetModelResponse:
            caller = admitted(self._callers, context, request)
            return pb.GetModelResponse(model=_model(find(self._models, caller, request.model)))

        return await answer("GetModel", context, get_model())

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: Context
    ) -> pb.TokenizeResponse | None:
        """The tokens of a prompt."""

        async def tokenize() -> pb.TokenizeResponse:
            caller = admitted(self._callers, context, request)
            bundle = find(self._models, caller, request.model, request.prompt).bundle
            return await asyncio.to_thread(_tokenized, bundle, request)

        return await answer("Tokenize", context, tokenize())

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse | None:
        """What tokens stand for."""

        async def detokenize() -> pb.DetokenizeResponse:
            caller = admitted(self._callers, context, request)
            bundle = find(self._models, caller, request.model).bundle
            return await asyncio.to_thread(_detokenized, bundle, request)

        return await answer("Detokenize", context, detokenize())


def _tokenized(bundle: Bundle, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
    ids = prompt_ids(bundle, request.prompt).tolist()
    return pb.TokenizeResponse(
        ids=ids,
        pieces=[bundle.codec.text.pieces[token] for token in ids],
        model=bundle.name,
        fingerprint=bundle.fingerprint,
    )


def _detokenized(bundle: Bundle, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
    ids = checked_ids(bundle, "ids", request.ids).tolist()
    return pb.DetokenizeResponse(
        text=bundle.codec.text.decode(ids),
        rgb=bundle.codec.rgb(ids),
        pieces=[bundle.codec.text.pieces[token] for token in ids],
        model=bundle.name,
        fingerprint=bundle.fingerprint,
    )


def _model(model: ServedModel) -> pb.Model:
    return pb.Model(
        manifest=model.bundle.manifest,
        slots=model.config.slots,
        queue_limit=model.config.queue_limit,
        max_state_bytes=model.bundle.max_state_bytes,
    )
