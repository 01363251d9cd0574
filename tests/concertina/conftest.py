"""A server of the real protocol that says what a test tells it to, and notes what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from concertina.v1 import bundle_pb2, model_service_pb2
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1.generation_service_pb2_grpc import (
    GenerationServiceServicer,
    add_GenerationServiceServicer_to_server,
)
from concertina.v1.model_service_pb2_grpc import (
    ModelServiceServicer,
    add_ModelServiceServicer_to_server,
)

WAIT = 20.0
PALETTE = bytes([0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0, 255])


class Status(Exception):
    """Ends the call with a status."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        self.details = details


class Fake(GenerationServiceServicer, ModelServiceServicer):
    """script: what Generate says: messages, a Status to end with, or an event to wait for.

    refusal: what Score, ListModels and GetModel end with.
    models: what is served. requests: what was asked, oldest first.
    cancelled: set when the client leaves a stream before its end.
    """

    def __init__(self) -> None:
        self.address = ""
        self.script: list[pb.GenerateResponse | Status | threading.Event] = []
        self.refusal: Status | None = None
        self.models = [text_model(), image_model()]
        self.requests: list[pb.GenerateRequest | pb.ScoreRequest] = []
        self.cancelled = threading.Event()
        self.never = threading.Event()

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        left = threading.Event()
        context.add_callback(left.set)
        try:
            for line in self.script:
                if isinstance(line, threading.Event):
                    while not line.wait(0.01):
                        if left.is_set():
                            return
                elif isinstance(line, Status):
                    context.abort(line.code, line.details)
                else:
                    yield line
        finally:
            if left.is_set():
                self.cancelled.set()

    def Score(self, request: pb.ScoreRequest, context: grpc.ServicerContext) -> pb.ScoreResponse:
        self.requests.append(request)
        self._maybe_refuse(context)
        return pb.ScoreResponse(
            bits_per_token=1.5, bits=[1, 2], model=request.model, fingerprint="f0"
        )

    def ListModels(
        self, request: model_service_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> model_service_pb2.ListModelsResponse:
        self._maybe_refuse(context)
        return model_service_pb2.ListModelsResponse(models=self.models)

    def GetModel(
        self, request: model_service_pb2.GetModelRequest, context: grpc.ServicerContext
    ) -> model_service_pb2.GetModelResponse:
        self._maybe_refuse(context)
        for model in self.models:
            if model.manifest.name == request.model:
                return model_service_pb2.GetModelResponse(model=model)
        context.abort(grpc.StatusCode.NOT_FOUND, f"model {request.model!r} is not served here")
        raise AssertionError

    def _maybe_refuse(self, context: grpc.ServicerContext) -> None:
        if self.refusal is not None:
            context.abort(self.refusal.code, self.refusal.details)

    @staticmethod
    def accepted(
        sequence: int = 1, prompt_tokens: int = 0, outputs: int = 1
    ) -> pb.GenerateResponse:
        accepted = pb.Accepted(
            stream_id="s1",
            model="prose",
            fingerprint="f0",
            sampling=pb.SamplingParameters(
                temperature=0.8,
                top_k=5,
                top_p=0.9,
                min_p=0,
                typical_p=0.7,
                repetition_penalty=1.1,
                presence_penalty=-0.3,
                frequency_penalty=0.6,
                logit_bias={9: 0.2},
                allowed_token_ids=[9, 10],
                bad_words=["no"],
                seed=7,
            ),
            stopping=pb.StoppingCriteria(
                max_tokens=9, min_tokens=2, stop=["\n"], stop_token_ids=[3], include_stop=True
            ),
            prompt_tokens=prompt_tokens,
            output=pb.OutputOptions(n=outputs, logprobs=0, stream_interval=4),
            priority=7,
        )
        return pb.GenerateResponse(sequence=sequence, accepted=accepted)

    @staticmethod
    def text(sequence: int, first_position: int, text: str, output: int = 0) -> pb.GenerateResponse:
        tokens = pb.Tokens(first_position=first_position, ids=text.encode(), text=text)
        return pb.GenerateResponse(sequence=sequence, tokens=tokens, output=output)

    @staticmethod
    def pixels(sequence: int, first_position: int, ids: list[int]) -> pb.GenerateResponse:
        rgb = b"".join(PALETTE[3 * index : 3 * index + 3] for index in ids)
        tokens = pb.Tokens(first_position=first_position, ids=ids, rgb=rgb)
        return pb.GenerateResponse(sequence=sequence, tokens=tokens)

    @staticmethod
    def finished(
        sequence: int, reason: pb.FinishReason = pb.FINISH_REASON_MAX_TOKENS, output: int = 0
    ) -> pb.GenerateResponse:
        usage = pb.Usage(generated_tokens=9, state_bytes=4096)
        usage.total_time.FromMilliseconds(1500)
        usage.time_to_first_token.FromMilliseconds(250)
        finished = pb.Finished(reason=reason, stop="\n", usage=usage)
        return pb.GenerateResponse(sequence=sequence, finished=finished, output=output)

    @staticmethod
    def error(
        sequence: int, code: str = "INTERNAL", message: str = "it broke"
    ) -> pb.GenerateResponse:
        error = pb.Error(code=code, message=message, retryable=True)
        error.retry_after.FromMilliseconds(2500)
        return pb.GenerateResponse(sequence=sequence, error=error)


def text_model(name: str = "prose") -> model_service_pb2.Model:
    manifest = bundle_pb2.Manifest(
        name=name,
        version="1",
        fingerprint="f0",
        modality=bundle_pb2.MODALITY_TEXT,
        vocabulary=256,
        context=8192,
        attention="fixed",
        parameters=12_300_000,
        metrics={"bits/byte": 1.25},
    )
    return model_service_pb2.Model(
        manifest=manifest, slots=16, queue_limit=64, max_state_bytes=3_000_000
    )


def image_model(name: str = "pictures") -> model_service_pb2.Model:
    """4 wide, 3 high: black, white, red, blue."""
    manifest = bundle_pb2.Manifest(
        name=name,
        fingerprint="f1",
        modality=bundle_pb2.MODALITY_IMAGE,
        vocabulary=4,
        labels=["Food & Drink"],
        context=12,
        image=bundle_pb2.ImageFormat(width=4, height=3, palette=PALETTE),
        attention="fixed",
        parameters=5_000_000,
    )
    return model_service_pb2.Model(manifest=manifest, slots=8)


@pytest.fixture
def fake() -> Iterator[Fake]:
    """A running fake server."""
    fake = Fake()
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        add_GenerationServiceServicer_to_server(fake, server)
        add_ModelServiceServicer_to_server(fake, server)
        fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield fake
        server.stop(None).wait(WAIT)
