"""The API over plain engines: protobuf in, protobuf out. Knows grpc.aio, but neither Ray nor ONNX.

A handler never lets an exception out, since some homes would send its text to the client: a refused
request ends by status, a stream that was accepted ends by an event.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.duration_pb2 import Duration

from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import generation_service_pb2_grpc as generation_grpc
from concertina.v1 import model_service_pb2 as model_pb
from concertina.v1 import model_service_pb2_grpc as model_grpc
from server.bundle import Bundle, load_bundle
from server.config import EngineConfig
from server.engine import Engine
from server.errors import BundleError, RequestError, StepFailed, UnknownModel
from server.logit_rules import LogitRules
from server.logprobs import TokenLogprobs
from server.request import generate_request, score_request
from server.stream import (
    Delta,
    Event,
    Finish,
    FinishReason,
    PromptLogprobs,
    Request,
    Scored,
    Stream,
)

_log = logging.getLogger(__name__)
_INTERNAL = "internal error; see the server's log"
_REASONS = {
    FinishReason.END: pb.FINISH_REASON_END,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.MAX_TOKENS: pb.FINISH_REASON_MAX_TOKENS,
    FinishReason.TIME_LIMIT: pb.FINISH_REASON_TIME_LIMIT,
}


class Context(Protocol):
    """What handlers use of a call's context: the part that grpc.aio and Ray Serve share."""

    def set_code(self, code: grpc.StatusCode) -> None:
        """Status of the call."""

    def set_details(self, details: str) -> None:
        """Its message."""


def open_engines(bundles: Sequence[Path], config: EngineConfig) -> dict[str, Engine]:
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
            engines[bundle.name] = Engine(bundle, config)
    except BaseException:
        for engine in engines.values():
            engine.close()
        raise
    return engines


class GenerationServicer(generation_grpc.GenerationServiceServicer):
    """Generate and Score."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """One stream; see generation_service.proto."""
        try:
            engine = _find(self._engines, request.model)
            wanted = generate_request(engine.bundle, request, engine.config)
            streams = engine.submit_together(wanted)
        except Exception as error:
            if isinstance(error, RequestError) and error.retryable:
                yield pb.GenerateResponse(sequence=1, error=_error(error))
            _refuse(context, error)
            return
        sequence, told = 1, set[Stream]()
        try:
            accepted = _accepted(engine.bundle, streams)
            yield pb.GenerateResponse(sequence=sequence, accepted=accepted)
            async for stream, event in engine.events_together(streams):
                response = _response(engine.bundle, stream.request, event, sequence + 1)
                sequence += 1
                yield response
                if stream.is_over:
                    told.add(stream)
        except Exception as error:
            if isinstance(error, grpc.RpcError):  # the client is gone; there is nobody to tell
                raise
            _log.exception("stream %s failed", streams[0].id)
            for stream in streams:
                if stream not in told:
                    sequence += 1
                    yield _response(engine.bundle, stream.request, StepFailed(_INTERNAL), sequence)
        finally:
            for stream in streams:
                engine.cancel(stream)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse | None:
        """Bits per token; see generation_service.proto."""
        try:
            engine = _find(self._engines, request.model)
            stream = engine.submit(score_request(engine.bundle, request))
        except Exception as error:
            _refuse(context, error)
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
                    _refuse(context, event)
        except Exception as error:
            _refuse(context, error)
            return None
        finally:
            engine.cancel(stream)
        return None


class ModelServicer(model_grpc.ModelServiceServicer):
    """ListModels and GetModel."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines

    async def ListModels(
        self, request: model_pb.ListModelsRequest, context: Context
    ) -> model_pb.ListModelsResponse:
        """Every model served, by name."""
        models = [_model(engine) for _, engine in sorted(self._engines.items())]
        return model_pb.ListModelsResponse(models=models)

    async def GetModel(
        self, request: model_pb.GetModelRequest, context: Context
    ) -> model_pb.GetModelResponse | None:
        """One model."""
        try:
            return model_pb.GetModelResponse(model=_model(_find(self._engines, request.model)))
        except RequestError as error:
            _refuse(context, error)
            return None


def _find(engines: Mapping[str, Engine], name: str) -> Engine:
    if name in engines:
        return engines[name]
    known = ", ".join(sorted(engines))
    if name:
        raise UnknownModel(f"model {name[:100]!r} is not served here; these are: {known}")
    if len(engines) > 1:
        raise UnknownModel(f"model is empty, and several are served: choose one of {known}")
    return next(iter(engines.values()))


def _refuse(context: Context, error: Exception) -> None:
    if not isinstance(error, RequestError):
        _log.error("a request failed", exc_info=error)
        error = StepFailed(_INTERNAL)
    context.set_code(error.code)
    context.set_details(error.message)


def _accepted(bundle: Bundle, streams: Sequence[Stream]) -> pb.Accepted:
    request = streams[0].request
    stopping = pb.StoppingCriteria(
        max_tokens=request.max_tokens,
        min_tokens=request.min_tokens,
        include_stop=request.include_stop,
        stop=request.stop,
        stop_token_ids=sorted(request.stop_tokens),
        ignore_eos=bundle.manifest.HasField("end_token") and request.end_token is None,
    )
    if request.time_limit_s is not None:
        stopping.time_limit.CopyFrom(_duration(request.time_limit_s))
    sampling, rules = request.sampling, request.sampling.rules or LogitRules()
    return pb.Accepted(
        stream_id=streams[0].id,
        model=bundle.name,
        fingerprint=bundle.manifest.fingerprint,
        sampling=pb.SamplingParameters(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
            typical_p=sampling.typical_p,
            repetition_penalty=rules.repetition_penalty,
            presence_penalty=rules.presence_penalty,
            frequency_penalty=rules.frequency_penalty,
            logit_bias=dict(rules.bias),
            allowed_token_ids=rules.allowed,
            bad_words=[bytes(word).decode() for word in rules.bad_words],
        ),
        stopping=stopping,
        prompt_tokens=len(request.prompt) - 1,
        output=pb.OutputOptions(
            n=len(streams),
            logprobs=sampling.logprobs,
            prompt_logprobs=request.prompt_logprobs,
            stream_interval=request.stream_interval,
        ),
        priority=request.priority,
    )


def _response(bundle: Bundle, request: Request, event: Event, sequence: int) -> pb.GenerateResponse:
    response = pb.GenerateResponse(sequence=sequence, output=request.sampling.output)
    match event:
        case Delta(first_position=position, tokens=tokens, text=text):
            rgb = _colours(bundle, tokens) if bundle.is_image else b""
            logprobs = _logprobs(event.logprobs)
            response.tokens.CopyFrom(
                pb.Tokens(
                    first_position=position, ids=tokens, text=text, rgb=rgb, logprobs=logprobs
                )
            )
        case PromptLogprobs(first_position=position, logprobs=said):
            response.prompt_logprobs.CopyFrom(
                pb.PromptLogprobs(first_position=position, logprobs=_logprobs(said))
            )
        case Finish():
            usage = pb.Usage(
                prompt_tokens=len(request.prompt) - 1,
                generated_tokens=event.generated,
                queue_time=_duration(event.queue_s),
                time_to_first_token=_duration(event.first_token_s),
                total_time=_duration(event.total_s),
                state_bytes=event.state_bytes,
            )
            finished = pb.Finished(reason=_REASONS[event.reason], stop=event.stop, usage=usage)
            response.finished.CopyFrom(finished)
        case RequestError():
            response.error.CopyFrom(_error(event))
        case Scored():
            raise AssertionError("a generated stream is never scored")
    return response


def _logprobs(said: Iterable[TokenLogprobs]) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs(logprob=s.logprob, top_ids=s.top_ids, top_logprobs=s.top_logprobs)
        for s in said
    ]


def _error(error: RequestError) -> pb.Error:
    message = pb.Error(code=error.code.name, message=error.message, retryable=error.retryable)
    if error.retry_after_s is not None:
        message.retry_after.CopyFrom(_duration(error.retry_after_s))
    return message


def _model(engine: Engine) -> model_pb.Model:
    return model_pb.Model(
        manifest=engine.bundle.manifest,
        slots=engine.config.slots,
        queue_limit=engine.config.queue_limit,
        max_state_bytes=engine.bundle.max_state_bytes,
    )


def _colours(bundle: Bundle, tokens: Iterable[int]) -> bytes:
    palette: npt.NDArray[np.uint8] = np.frombuffer(bundle.manifest.image.palette, np.uint8)
    return palette.reshape(-1, 3)[list(tokens)].tobytes()


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
