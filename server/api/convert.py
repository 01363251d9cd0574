"""What the engine's words are on the wire: protobuf messages from events, and back."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from google.protobuf.duration_pb2 import Duration

from concertina.v1 import generation_service_pb2 as pb
from server.bundles.bundle import Bundle
from server.engine.events import (
    Delta,
    Event,
    Finish,
    FinishReason,
    HandedOver,
    PromptLogprobs,
    Request,
    Scored,
)
from server.engine.sampling.logits_processors import LogitRules
from server.engine.sampling.logprobs import TokenLogprobs
from server.errors import RequestError
from server.sessions.table import Session

_REASONS = {
    FinishReason.END: pb.FINISH_REASON_END,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.MAX_TOKENS: pb.FINISH_REASON_MAX_TOKENS,
    FinishReason.TIME_LIMIT: pb.FINISH_REASON_TIME_LIMIT,
    FinishReason.PAUSED: pb.FINISH_REASON_PAUSED,
}
MAX_SECONDS = 10**10  # protobuf has room for more, but no stream has
_BY_NUMBER = {number: reason for reason, number in _REASONS.items()}


def accepted_message(bundle: Bundle, session: Session, durable: bool) -> pb.Accepted:
    """What was accepted, with every default filled in."""
    streams, terms = session.streams, session.terms
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
        stopping.time_limit.CopyFrom(duration(request.time_limit_s))
    sampling, rules = request.sampling, request.sampling.rules or LogitRules()
    return pb.Accepted(
        keep=duration(terms.keep_s) if terms.keep_s else None,
        durable=durable,
        stream_id=terms.stream_id,
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


def response_message(
    bundle: Bundle, request: Request, event: Event, sequence: int
) -> pb.GenerateResponse:
    """One event of a stream."""
    response = pb.GenerateResponse(sequence=sequence, output=request.sampling.output)
    match event:
        case Delta(first_position=position, tokens=tokens, text=text):
            rgb = _colours(bundle, tokens) if bundle.is_image else b""
            logprobs = logprobs_messages(event.logprobs)
            response.tokens.CopyFrom(
                pb.Tokens(
                    first_position=position, ids=tokens, text=text, rgb=rgb, logprobs=logprobs
                )
            )
        case PromptLogprobs(first_position=position, logprobs=said):
            response.prompt_logprobs.CopyFrom(
                pb.PromptLogprobs(first_position=position, logprobs=logprobs_messages(said))
            )
        case Finish():
            response.finished.CopyFrom(finished_message(event, len(request.prompt) - 1))
        case HandedOver():
            response.handed_over.SetInParent()
        case RequestError():
            response.error.CopyFrom(error_message(event))
        case Scored():
            raise AssertionError("a generated stream is never scored")
    return response


def logprobs_messages(said: Iterable[TokenLogprobs]) -> list[pb.TokenLogprobs]:
    """How likely tokens were."""
    return [
        pb.TokenLogprobs(logprob=s.logprob, top_ids=s.top_ids, top_logprobs=s.top_logprobs)
        for s in said
    ]


def error_message(error: RequestError) -> pb.Error:
    """Why a request or a stream failed."""
    message = pb.Error(code=error.code.name, message=error.message, retryable=error.retryable)
    if error.retry_after_s is not None:
        message.retry_after.CopyFrom(duration(error.retry_after_s))
    return message


def _colours(bundle: Bundle, tokens: Iterable[int]) -> bytes:
    palette: npt.NDArray[np.uint8] = np.frombuffer(bundle.manifest.image.palette, np.uint8)
    return palette.reshape(-1, 3)[list(tokens)].tobytes()


def duration(seconds: float) -> Duration:
    """Seconds as protobuf has them."""
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def finished_message(finish: Finish, prompt_tokens: int) -> pb.Finished:
    """How an output ended well."""
    usage = pb.Usage(
        prompt_tokens=prompt_tokens,
        generated_tokens=finish.generated,
        queue_time=duration(finish.queue_s),
        time_to_first_token=duration(finish.first_token_s),
        total_time=duration(finish.total_s),
        state_bytes=finish.state_bytes,
    )
    return pb.Finished(reason=_REASONS[finish.reason], stop=finish.stop, usage=usage)


def finish_from(message: pb.Finished) -> Finish:
    """The same, back. Raises ValueError where it says what is true of no output."""
    usage = message.usage
    times = tuple(map(seconds, (usage.queue_time, usage.time_to_first_token, usage.total_time)))
    queue_s, first_token_s, total_s = times
    if message.reason not in _BY_NUMBER or not all(0 <= t <= MAX_SECONDS for t in times):
        raise ValueError(f"reason {message.reason}, times {times}")
    return Finish(
        _BY_NUMBER[message.reason],
        message.stop if message.HasField("stop") else None,
        usage.generated_tokens,
        queue_s,
        first_token_s,
        total_s,
        usage.state_bytes,
    )


def seconds(duration: Duration) -> float:
    """What protobuf has, in seconds."""
    return float(duration.seconds + duration.nanos / 1e9)
