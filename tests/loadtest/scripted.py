"""A server of the real protocol that answers every stream as a script tells it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias

import grpc

from concertina.v1 import (
    bundle_pb2,
    generation_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)
from concertina.v1 import generation_service_pb2 as pb

Context: TypeAlias = "grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]"
Events: TypeAlias = list[pb.GenerateResponse]
Stream: TypeAlias = AsyncIterator[pb.GenerateResponse]
Script: TypeAlias = Callable[[pb.GenerateRequest, Context], Stream]
Serve: TypeAlias = Callable[[Script], Awaitable[str]]


def keep_contract(request: pb.GenerateRequest) -> Events:
    """The events of a stream as it should be, two tokens in each."""
    prompt, asked = len(request.prompt.tokens.ids), request.stopping.max_tokens
    events = [pb.GenerateResponse(accepted=pb.Accepted(stream_id="s", prompt_tokens=prompt))]
    for done in range(0, asked, 2):
        ids = range(done, min(done + 2, asked))
        tokens = pb.Tokens(first_position=prompt + done, ids=ids)
        events.append(pb.GenerateResponse(tokens=tokens))
    finished = pb.Finished(reason=pb.FINISH_REASON_MAX_TOKENS)
    events.append(pb.GenerateResponse(finished=finished))
    for sequence, event in enumerate(events, start=1):
        event.sequence = sequence
    return events


async def serve(script: Script) -> tuple[grpc.aio.Server, str]:
    """A running server of one text model, and its address."""
    server = grpc.aio.server()
    add_generation = generation_service_pb2_grpc.add_GenerationServiceServicer_to_server
    add_generation(_Generation(script), server)  # type: ignore[no-untyped-call]
    add_models = model_service_pb2_grpc.add_ModelServiceServicer_to_server
    add_models(_Models(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


class _Generation(generation_service_pb2_grpc.GenerationServiceServicer):
    def __init__(self, script: Script) -> None:
        self._script = script

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> Stream:
        async for event in self._script(request, context):
            yield event


class _Models(model_service_pb2_grpc.ModelServiceServicer):
    async def GetModel(
        self, request: model_service_pb2.GetModelRequest, context: Context
    ) -> model_service_pb2.GetModelResponse:
        manifest = bundle_pb2.Manifest(
            name="script",
            modality=bundle_pb2.MODALITY_TEXT,
            vocabulary=256,
            context=1024,
            fingerprint="f" * 64,
        )
        model = model_service_pb2.Model(manifest=manifest, slots=4)
        return model_service_pb2.GetModelResponse(model=model)
