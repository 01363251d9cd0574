"""The RPCs ListModels and GetModel."""

from __future__ import annotations

from collections.abc import Mapping

from concertina.v1 import model_service_pb2 as pb
from concertina.v1 import model_service_pb2_grpc as model_grpc
from server.api.context import Context, admitted, answer, find, visible
from server.auth.api_keys import Callers
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

        return await answer(context, list_models())

    async def GetModel(
        self, request: pb.GetModelRequest, context: Context
    ) -> pb.GetModelResponse | None:
        """One model."""

        async def get_model() -> pb.GetModelResponse:
            caller = admitted(self._callers, context, request)
            return pb.GetModelResponse(model=_model(find(self._models, caller, request.model)))

        return await answer(context, get_model())


def _model(model: ServedModel) -> pb.Model:
    return pb.Model(
        manifest=model.bundle.manifest,
        slots=model.config.slots,
        queue_limit=model.config.queue_limit,
        max_state_bytes=model.bundle.max_state_bytes,
    )
