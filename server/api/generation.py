"""Generation and models over plain engines: protobuf in, protobuf out; neither Ray nor ONNX."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path

import numpy as np

from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import generation_service_pb2_grpc as generation_grpc
from concertina.v1 import model_service_pb2 as model_pb
from concertina.v1 import model_service_pb2_grpc as model_grpc
from server.api.context import Context, find, refusal, refuse, send, visible
from server.api.validate import resume_request, score_request
from server.auth.api_keys import Callers
from server.auth.quota import require_room
from server.bundles.bundle import load_bundle
from server.config import EngineConfig
from server.engine.engine import Engine
from server.engine.events import Scored
from server.errors import BundleError, RequestError
from server.sessions.registry import Sessions
from server.snapshots.snapshots import Keeper


def open_engines(
    bundles: Sequence[Path], config: EngineConfig, keeper: Keeper | None = None
) -> dict[str, Engine]:
    """Verify and load `bundles`, and start an engine for each, by name.

    Raises BundleError, with no engine left running, when one cannot be served.
    """
    loaded = [load_bundle(folder) for folder in bundles]
    names = [bundle.name for bundle in loaded]
    for bundle in loaded:
        if names.count(bundle.name) > 1:
            raise BundleError(f"{bundle.folder}: another bundle is named {bundle.name!r}, too")
    engines: dict[str, Engine] = {}
    try:
        for bundle in loaded:
            engines[bundle.name] = Engine(bundle, config, keeper)
    except BaseException:
        for engine in engines.values():
            engine.close()
        raise
    return engines


class GenerationServicer(generation_grpc.GenerationServiceServicer):
    """Generate, Resume and Score."""

    def __init__(self, sessions: Sessions, callers: Callers) -> None:
        self._sessions = sessions
        self._engines = sessions.engines
        self._callers = callers

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """One stream; see generation_service.proto."""
        try:
            caller = self._callers.of(context)
            engine = find(self._engines, caller, request.model)
            following = await self._sessions.start(engine, request, caller)
        except Exception as error:
            if (said := refusal(error)) is not None:
                yield said
            refuse(context, error)
            return
        durable = self._sessions.is_durable(following.session)
        async with aclosing(send(following, 0, durable)) as responses:
            async for response in responses:
                yield response

    async def Resume(
        self, request: pb.ResumeRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """The rest of a stream; see generation_service.proto."""
        try:
            caller = self._callers.of(context)
            received = resume_request(request)
            if self._sessions.held(request.stream_id, caller.name) is None:
                more = sum(not had.ended for had in received) or 1
                require_room(caller, self._sessions.running, more)
            following = await self._sessions.follow(request.stream_id, caller.name, received)
        except Exception as error:
            if (said := refusal(error, request.after_sequence)) is not None:
                yield said
            refuse(context, error)
            return
        durable = self._sessions.is_durable(following.session)
        async with aclosing(send(following, request.after_sequence, durable)) as responses:
            async for response in responses:
                yield response

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse | None:
        """Bits per token; see generation_service.proto."""
        try:
            caller = self._callers.of(context)
            engine = find(self._engines, caller, request.model)
            engine.require_room()
            require_room(caller, self._sessions.running, 1)
            stream = engine.submit(score_request(engine.bundle, request), caller.name)
        except Exception as error:
            refuse(context, error)
            return None
        try:
            async for event in engine.events(stream):
                if isinstance(event, Scored):
                    return pb.ScoreResponse(
                        bits_per_token=float(np.mean(event.bits)),
                        bits=event.bits,
                        model=engine.bundle.name,
                        fingerprint=engine.bundle.manifest.fingerprint,
                    )
                if isinstance(event, RequestError):
                    refuse(context, event)
        except Exception as error:
            refuse(context, error)
            return None
        finally:
            engine.cancel(stream)
        return None


class ModelServicer(model_grpc.ModelServiceServicer):
    """ListModels and GetModel."""

    def __init__(self, engines: Mapping[str, Engine], callers: Callers) -> None:
        self._engines = engines
        self._callers = callers

    async def ListModels(
        self, request: model_pb.ListModelsRequest, context: Context
    ) -> model_pb.ListModelsResponse | None:
        """Every model that the caller may use, by name."""
        try:
            seen = visible(self._engines, self._callers.of(context))
        except RequestError as error:
            refuse(context, error)
            return None
        models = [_model(engine) for _, engine in sorted(seen.items())]
        return model_pb.ListModelsResponse(models=models)

    async def GetModel(
        self, request: model_pb.GetModelRequest, context: Context
    ) -> model_pb.GetModelResponse | None:
        """One model."""
        try:
            engine = find(self._engines, self._callers.of(context), request.model)
            return model_pb.GetModelResponse(model=_model(engine))
        except RequestError as error:
            refuse(context, error)
            return None


def _model(engine: Engine) -> model_pb.Model:
    return model_pb.Model(
        manifest=engine.bundle.manifest,
        slots=engine.config.slots,
        queue_limit=engine.config.queue_limit,
        max_state_bytes=engine.bundle.max_state_bytes,
    )
