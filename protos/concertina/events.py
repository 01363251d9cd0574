"""The events of a stream, and the contract they keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

import grpc
from google.protobuf.duration_pb2 import Duration

from concertina.errors import (
    ContractViolation,
    GenerationFailed,
    StreamCut,
    refusal,
    status_error,
)
from concertina.v1 import generation_service_pb2 as pb


class FinishReason(StrEnum):
    """Why a stream ended."""

    END = "end"  # the model drew its end token, or the image is complete
    STOP = "stop"  # a stop string or a stop token id was drawn
    MAX_TOKENS = "max_tokens"
    TIME_LIMIT = "time_limit"
    UNKNOWN = "unknown"  # a reason that only a newer client knows


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of a stream are drawn, every default filled in."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    allowed_token_ids: tuple[int, ...]
    bad_words: tuple[str, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Stopping:
    """When a stream ends, every default filled in; `time_limit` in seconds, None for never."""

    max_tokens: int
    min_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    include_stop: bool
    ignore_eos: bool
    time_limit: float | None


@dataclass(frozen=True, slots=True)
class Output:
    """What is sent, every default filled in; None for log-probabilities that are not."""

    n: int
    logprobs: int | None
    prompt_logprobs: int | None
    stream_interval: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request was admitted; always the first event."""

    sequence: int
    stream_id: str
    model: str
    fingerprint: str
    sampling: Sampling
    stopping: Stopping
    prompt_tokens: int
    output: Output
    priority: int = 0

    @property
    def seed(self) -> int:
        """Seed in force; the same seed, prompt and bundle give the same stream."""
        return self.sampling.seed


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of how probable the model held a token and those it held likeliest."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of more tokens of the prompt, from `first_position` on."""

    sequence: int
    first_position: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """More tokens, a delta. `first_position` counts from the prompt's first token, which is 0.

    text: whole characters that the tokens complete, for text models.
    rgb: three bytes per token, for image models.
    output: which of the `n` outputs they belong to.
    logprobs: one for each token, if they were asked for.
    """

    sequence: int
    first_position: int
    ids: tuple[int, ...]
    text: str
    rgb: bytes
    output: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts, times in seconds since acceptance, and bytes of one stream."""

    prompt_tokens: int
    generated_tokens: int
    queue_time: float
    time_to_first_token: float
    total_time: float
    state_bytes: int


@dataclass(frozen=True, slots=True)
class Finished:
    """An output is complete; always its last event. `stop` is the stop string that was met."""

    sequence: int
    reason: FinishReason
    stop: str | None
    usage: Usage
    output: int = 0


Event: TypeAlias = Accepted | PromptLogprobs | Tokens | Finished

_REASONS = {
    pb.FINISH_REASON_END: FinishReason.END,
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_MAX_TOKENS: FinishReason.MAX_TOKENS,
    pb.FINISH_REASON_TIME_LIMIT: FinishReason.TIME_LIMIT,
}


def seconds(duration: Duration) -> float:
    """A protobuf duration in seconds."""
    return duration.seconds + duration.nanos / 1e9


class EventReader:
    """Turns the messages of one stream into events and holds the stream to its contract.

    address: where the stream comes from, named in errors.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._stream_id = ""
        self._sequence = 0
        self._prompt_position = 0
        self._positions: list[int] = []  # of each output; empty before the stream is accepted
        self._finished: set[int] = set()
        self._complete = False

    def read(self, message: pb.GenerateResponse) -> Event:
        """The event in `message`.

        Raises ContractViolation for a gap, a repetition, or an event out of place, and
        GenerationFailed (or the class of its code, if nothing was accepted) for an error event.
        """
        kind = message.WhichOneof("event")
        if self._complete:
            raise self._violation(f"`{kind}` follows the terminal event")
        if message.sequence != self._sequence + 1:
            raise self._violation(
                f"event {message.sequence} follows event {self._sequence}, "
                f"{self._sequence + 1} was due"
            )
        if (kind == "accepted") != (self._sequence == 0) and kind != "error":
            raise self._violation(f"event {message.sequence} is `{kind}`")
        self._sequence = message.sequence
        output = message.output
        if kind in ("tokens", "finished") and output >= len(self._positions):
            raise self._violation(
                f"event {message.sequence} is of output {output}, {len(self._positions)} were due"
            )
        if output in self._finished:
            raise self._violation(f"`{kind}` follows the terminal event of output {output}")
        match kind:
            case "accepted":
                return self._accepted(message.accepted)
            case "prompt_logprobs":
                return self._prompt_logprobs(message.prompt_logprobs)
            case "tokens":
                return self._tokens(message.tokens, output)
            case "finished":
                self._finished.add(output)
                self._complete = len(self._finished) == len(self._positions)
                return _finished(self._sequence, message.finished, output)
            case "error":
                self._complete = True
                raise self._failure(message.error)
        raise self._violation(f"event {message.sequence} is of no kind this client knows")

    def end(self, code: grpc.StatusCode, details: str) -> None:
        """Checks that the call may end here, with this status.

        A status after the terminal event says nothing. Raises StreamCut if the terminal event is
        missing, DeadlineExceeded if the caller's timeout is why, and the class of the status if
        nothing was accepted.
        """
        if self._complete:
            return
        refused = self._sequence == 0 and code is not grpc.StatusCode.OK
        if refused or code is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise status_error(self._address, code, details)
        raise StreamCut(self._stream_id, self._sequence, code.name, details)

    def _accepted(self, accepted: pb.Accepted) -> Accepted:
        self._stream_id = accepted.stream_id
        sampling, stopping, options = accepted.sampling, accepted.stopping, accepted.output
        self._positions = [accepted.prompt_tokens] * max(1, options.n)
        return Accepted(
            sequence=self._sequence,
            stream_id=accepted.stream_id,
            model=accepted.model,
            fingerprint=accepted.fingerprint,
            sampling=Sampling(
                temperature=_shortest(sampling.temperature),
                top_k=sampling.top_k,
                top_p=_shortest(sampling.top_p),
                min_p=_shortest(sampling.min_p),
                typical_p=_shortest(sampling.typical_p),
                repetition_penalty=_shortest(sampling.repetition_penalty),
                presence_penalty=_shortest(sampling.presence_penalty),
                frequency_penalty=_shortest(sampling.frequency_penalty),
                logit_bias={id_: _shortest(bias) for id_, bias in sampling.logit_bias.items()},
                allowed_token_ids=tuple(sampling.allowed_token_ids),
                bad_words=tuple(sampling.bad_words),
                seed=sampling.seed,
            ),
            stopping=Stopping(
                max_tokens=stopping.max_tokens,
                min_tokens=stopping.min_tokens,
                stop=tuple(stopping.stop),
                stop_token_ids=tuple(stopping.stop_token_ids),
                include_stop=stopping.include_stop,
                ignore_eos=stopping.ignore_eos,
                time_limit=(
                    seconds(stopping.time_limit) if stopping.HasField("time_limit") else None
                ),
            ),
            prompt_tokens=accepted.prompt_tokens,
            output=Output(
                n=len(self._positions),
                logprobs=options.logprobs if options.HasField("logprobs") else None,
                prompt_logprobs=(
                    options.prompt_logprobs if options.HasField("prompt_logprobs") else None
                ),
                stream_interval=options.stream_interval,
            ),
            priority=accepted.priority,
        )

    def _prompt_logprobs(self, told: pb.PromptLogprobs) -> PromptLogprobs:
        self._check_position(told.first_position, self._prompt_position)
        self._prompt_position += len(told.logprobs)
        return PromptLogprobs(self._sequence, told.first_position, _logprobs(told.logprobs))

    def _tokens(self, tokens: pb.Tokens, output: int) -> Tokens:
        self._check_position(tokens.first_position, self._positions[output])
        if tokens.rgb and len(tokens.rgb) != 3 * len(tokens.ids):
            raise self._violation(
                f"event {self._sequence} has {len(tokens.rgb)} bytes of colour "
                f"for {len(tokens.ids)} tokens"
            )
        self._positions[output] += len(tokens.ids)
        return Tokens(
            self._sequence,
            tokens.first_position,
            tuple(tokens.ids),
            tokens.text,
            tokens.rgb,
            output,
            _logprobs(tokens.logprobs),
        )

    def _check_position(self, position: int, due: int) -> None:
        if position != due:
            raise self._violation(
                f"event {self._sequence} starts at position {position}, {due} was due"
            )

    def _failure(self, error: pb.Error) -> Exception:
        retry_after = seconds(error.retry_after) if error.HasField("retry_after") else None
        if not self._stream_id:
            return refusal(
                error.code, error.message, retryable=error.retryable, retry_after=retry_after
            )
        return GenerationFailed(
            error.message, code=error.code, retryable=error.retryable, retry_after=retry_after
        )

    def _violation(self, what: str) -> ContractViolation:
        stream = f"stream {self._stream_id or '(not accepted)'}"
        return ContractViolation(f"{self._address} broke the contract of {stream}: {what}")


def _finished(sequence: int, finished: pb.Finished, output: int) -> Finished:
    usage = finished.usage
    return Finished(
        sequence=sequence,
        reason=_REASONS.get(finished.reason, FinishReason.UNKNOWN),
        stop=finished.stop if finished.HasField("stop") else None,
        usage=Usage(
            prompt_tokens=usage.prompt_tokens,
            generated_tokens=usage.generated_tokens,
            queue_time=seconds(usage.queue_time),
            time_to_first_token=seconds(usage.time_to_first_token),
            total_time=seconds(usage.total_time),
            state_bytes=usage.state_bytes,
        ),
        output=output,
    )


def _logprobs(told: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(one.logprob, tuple(one.top_ids), tuple(one.top_logprobs)) for one in told
    )


def _shortest(value: float) -> float:
    # A float32 of the wire as the decimal that was meant: 0.8, not 0.800000011920929.
    return float(f"{value:.7g}")
