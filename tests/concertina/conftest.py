"""A server of the real protocol that says what a test tells it to, and notes what it was asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from concertina.v1 import bundle_pb2, model_service_pb2
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import session_service_pb2 as session_pb
from concertina.v1.generation_service_pb2_grpc import (
    GenerationServiceServicer,
    add_GenerationServiceServicer_to_server,
)
from concertina.v1.model_service_pb2_grpc import (
    ModelServiceServicer,
    add_ModelServiceServicer_to_server,
)
from concertina.v1.session_service_pb2_grpc import (
    SessionServiceServicer,
    add_SessionServiceServicer_to_server,
)

WAIT = 20.0
PALETTE = bytes([0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0, 255])


class Status(Exception):
    """Ends the call with a status."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        self.details = details


Line: TypeAlias = pb.GenerateResponse | Status | threading.Event


class Fake(GenerationServiceServicer, ModelServiceServicer, SessionServiceServicer):
    """script: what Generate and Continue say: messages, a Status to end with, an event to wait for.

    scripts: the same for Resume, one after the other; the last of them again and again.
    times: when Generate and Resume were called.
    releases: what Delete and Pause were asked.
    refusal: what Score, ListModels and GetModel end with.
    letters: how many are a token. before: what the tokenizer puts before a text.
    models: what is served. requests: what was asked, oldest first.
    cancelled: set when the client leaves a stream before its end.
    """

    def __init__(self) -> None:
        self.address = ""
        self.script: list[Line] = []
        self.scripts: list[list[Line]] = []
        self.times: list[float] = []
        self.releases: list[Message] = []
        self.refusal: Status | None = None
        self.models = [text_model(), image_model()]
        self.letters, self.before = 2, ""
        self.requests: list[Any] = []
        self.cancelled = threading.Event()
        self.never = threading.Event()

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        return self._say(request, context, self.script)

    def Resume(
        self, request: pb.ResumeRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        return self._say(
            request, context, self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        )

    def Continue(
        self, request: session_pb.ContinueRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        return self._say(request, context, self.script)

    def Delete(
        self, request: session_pb.DeleteRequest, context: grpc.ServicerContext
    ) -> session_pb.DeleteResponse:
        self.releases.append(request)
        return session_pb.DeleteResponse()

    def Pause(
        self, request: session_pb.PauseRequest, context: grpc.ServicerContext
    ) -> session_pb.PauseResponse:
        self.releases.append(request)
        return session_pb.PauseResponse()

    def _say(
        self, request: Message, context: grpc.ServicerContext, script: Sequence[Line]
    ) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.times.append(time.monotonic())
        left = threading.Event()
        context.add_callback(left.set)
        try:
            for line in script:
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
        ids = request.prompt.tokens.ids
        bits = range(len(ids)) if ids else [1, 2]
        named = {each.manifest.name: each.manifest for each in self.models}
        manifest = named.get(request.model, self.models[0].manifest)
        if manifest.HasField("tokenizer") and not manifest.tokenizer.HasField("begin_token"):
            bits = bits[1:]  # the first token follows from nothing
        return pb.ScoreResponse(
            bits_per_token=1.5, bits=bits, model=request.model, fingerprint="f0"
        )

    def Tokenize(
        self, request: model_service_pb2.TokenizeRequest, context: grpc.ServicerContext
    ) -> model_service_pb2.TokenizeResponse:
        """Every few letters are a token, whose id is the number of those before it."""
        self.requests.append(request)
        self._maybe_refuse(context)
        content, letters = (self.before + request.prompt.text).encode(), self.letters
        pieces = [content[at : at + letters] for at in range(0, len(content), letters)]
        return model_service_pb2.TokenizeResponse(
            ids=range(len(pieces)), pieces=pieces, model=request.model, fingerprint="f0"
        )

    def Detokenize(
        self, request: model_service_pb2.DetokenizeRequest, context: grpc.ServicerContext
    ) -> model_service_pb2.DetokenizeResponse:
        self.requests.append(request)
        self._maybe_refuse(context)
        return model_service_pb2.DetokenizeResponse(
            text="aé", rgb=b"rgb", pieces=[b"a", b"\xc3"], model=request.model, fingerprint="f0"
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
        sequence: int = 1,
        prompt_tokens: int = 0,
        outputs: int = 1,
        keep: int = 0,
        durable: bool = False,
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
            keep=Duration(seconds=keep) if keep else None,
            durable=durable,
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
        sequence: int, code: str = "INTERNAL", message: str = "it broke", retry_after_ms: int = 2500
    ) -> pb.GenerateResponse:
        error = pb.Error(code=code, message=message, retryable=True)
        error.retry_after.FromMilliseconds(retry_after_ms)
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
        add_SessionServiceServicer_to_server(fake, server)
        fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield fake
        server.stop(None).wait(WAIT)
