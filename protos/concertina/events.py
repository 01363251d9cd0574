"""The events of a stream, and the contract they keep."""

from __future__ import annotations

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
    seed: int


@dataclass(frozen=True, slots=True)
class Stopping:
    """When a stream ends, every default filled in; `time_limit` in seconds, None for never."""

    max_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    time_limit: float | None


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

    @property
    def seed(self) -> int:
        """Seed in force; the same seed, prompt and bundle give the same stream."""
        return self.sampling.seed


@dataclass(frozen=True, slots=True)
class Tokens:
    """More tokens, a delta. `first_position` counts from the prompt's first token, which is 0.

    text: whole characters that the tokens complete, for text models.
    rgb: three bytes per token, for image models.
    """

    sequence: int
    first_position: int
    ids: tuple[int, ...]
    text: str
    rgb: bytes


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
    """The stream is complete; always the last event. `stop` is the stop string that was met."""

    sequence: int
    reason: FinishReason
    stop: str | None
    usage: Usage


Event: TypeAlias = Accepted | Tokens | Finished

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
        self._position = 0
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
        match kind:
            case "accepted":
                return self._accepted(message.accepted)
            case "tokens":
                return self._tokens(message.tokens)
            case "finished":
                self._complete = True
                return _finished(self._sequence, message.finished)
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
        self._position = accepted.prompt_tokens
        sampling, stopping = accepted.sampling, accepted.stopping
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
                seed=sampling.seed,
            ),
            stopping=Stopping(
                max_tokens=stopping.max_tokens,
                stop=tuple(stopping.stop),
                stop_token_ids=tuple(stopping.stop_token_ids),
                ignore_eos=stopping.ignore_eos,
                time_limit=(
                    seconds(stopping.time_limit) if stopping.HasField("time_limit") else None
                ),
            ),
            prompt_tokens=accepted.prompt_tokens,
        )

    def _tokens(self, tokens: pb.Tokens) -> Tokens:
        if tokens.first_position != self._position:
            raise self._violation(
                f"event {self._sequence} starts at position {tokens.first_position}, "
                f"{self._position} was due"
            )
        if tokens.rgb and len(tokens.rgb) != 3 * len(tokens.ids):
            raise self._violation(
                f"event {self._sequence} has {len(tokens.rgb)} bytes of colour "
                f"for {len(tokens.ids)} tokens"
            )
        self._position += len(tokens.ids)
        return Tokens(
            self._sequence, tokens.first_position, tuple(tokens.ids), tokens.text, tokens.rgb
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


def _finished(sequence: int, finished: pb.Finished) -> Finished:
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
    )


def _shortest(value: float) -> float:
    # A float32 of the wire as the decimal that was meant: 0.8, not 0.800000011920929.
    return float(f"{value:.7g}")
