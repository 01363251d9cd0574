"""Turns the messages of a stream into events, and checks that they keep its contract."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import grpc

from concertina.client.errors import (
    ConcertinaError,
    ContractViolation,
    GenerationFailed,
    StreamCut,
)
from concertina.client.events import (
    Accepted,
    Cursor,
    Event,
    Finished,
    FinishReason,
    Output,
    PromptLogprobs,
    Sampling,
    Stopping,
    TokenLogprobs,
    Tokens,
    Usage,
)
from concertina.client.statuses import described, refusal, seconds, status_error
from concertina.v1 import generation_service_pb2 as pb

_REASONS = {
    pb.FINISH_REASON_END: FinishReason.END,
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_MAX_TOKENS: FinishReason.MAX_TOKENS,
    pb.FINISH_REASON_TIME_LIMIT: FinishReason.TIME_LIMIT,
    pb.FINISH_REASON_PAUSED: FinishReason.PAUSED,
}


_LAST_IDS = 1024  # sent per output to resume a stream; the contract allows 4096


@dataclass(slots=True)
class _Output:
    """What has arrived of one output. first_position: of its first token; None if not known."""

    first_position: int | None
    tokens: int = 0
    characters: int = 0
    last_ids: deque[int] = field(default_factory=lambda: deque(maxlen=_LAST_IDS))
    reason: FinishReason | None = None


class EventReader:
    """Turns the messages of one stream into events, and checks them against the contract.

    The messages may arrive over several calls.

    address: of the server, named in errors.
    continues: whether the stream had tokens before it was paused, or may have had.
    received: what an earlier reader has of each output.
    accepted: the stream's first event, once it has arrived.
    sequence: number of the last event; 0 for none.
    is_complete: whether every output has ended.
    """

    def __init__(
        self, address: str, continues: bool = False, received: Iterable[Cursor] = ()
    ) -> None:
        self._address = address
        self._continues = continues
        self._received = tuple(received)
        self.accepted: Accepted | None = None
        self.sequence = 0
        self.is_complete = False
        self._prompt_position = max((each.prompt_logprobs for each in self._received), default=0)
        self._outputs: list[_Output] = []  # empty before the stream is accepted

    @property
    def stream_id(self) -> str:
        """Name of the stream; empty before it is accepted."""
        return self.accepted.stream_id if self.accepted else ""

    @property
    def was_paused(self) -> bool:
        """Whether an output ended because the stream was paused."""
        return any(output.reason is FinishReason.PAUSED for output in self._outputs)

    def cursors(self) -> list[pb.ResumeCursor]:
        """What has arrived of every output, as `Resume` takes it."""
        return [
            pb.ResumeCursor(
                output=index,
                tokens=output.tokens,
                characters=output.characters,
                prompt_logprobs=self._prompt_position,
                ended=output.reason is not None,
                last_ids=output.last_ids,
            )
            for index, output in enumerate(self._outputs)
        ]

    def read(self, message: pb.GenerateResponse) -> Event | None:
        """The event in `message`; None if the stream goes on in another call.

        Raises ContractViolation for a gap, a repetition, or an event out of place, and
        GenerationFailed (or the class of its code, if nothing was accepted) for an error event.
        """
        kind = message.WhichOneof("event")
        if self.is_complete:
            raise self._violation(f"`{kind}` follows the terminal event")
        if message.sequence != self.sequence + 1:
            raise self._violation(
                f"event {message.sequence} follows event {self.sequence}, "
                f"{self.sequence + 1} was expected"
            )
        if (kind == "accepted") != (self.sequence == 0) and kind != "error":
            raise self._violation(f"event {message.sequence} is `{kind}`")
        self.sequence = message.sequence
        output = message.output
        if kind in ("tokens", "finished") and output >= len(self._outputs):
            raise self._violation(
                f"event {message.sequence} is of output {output}, "
                f"{len(self._outputs)} were expected"
            )
        ended = output < len(self._outputs) and self._outputs[output].reason is not None
        if ended and kind != "handed_over":
            raise self._violation(f"`{kind}` follows the terminal event of output {output}")
        match kind:
            case "accepted":
                return self._accepted(message.accepted)
            case "prompt_logprobs":
                return self._prompt_logprobs(message.prompt_logprobs)
            case "tokens":
                return self._tokens(message.tokens, output)
            case "finished":
                finished = _finished(self.sequence, message.finished, output)
                self._outputs[output].reason = finished.reason
                self.is_complete = all(output.reason is not None for output in self._outputs)
                return finished
            case "error":
                self.is_complete = True
                raise self._failure(message.error)
            case "handed_over":
                return None
        raise self._violation(
            f"event {message.sequence} is of a kind that this client does not know"
        )

    def end(
        self, code: grpc.StatusCode, details: str, told: pb.Error | None = None
    ) -> ConcertinaError | None:
        """The error of a call that ends with this status; None if the stream is over.

        A status after the terminal event means nothing. StreamCut if the terminal event is missing,
        DeadlineExceeded if the caller's timeout has passed, and the class of the status if the
        stream was not accepted.
        """
        if self.is_complete:
            return None
        refused = self.sequence == 0 and code is not grpc.StatusCode.OK
        if refused or code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return status_error(self._address, code, details, told)
        return StreamCut(self.stream_id, self.sequence, code.name, details)

    def _accepted(self, accepted: pb.Accepted) -> Accepted:
        sampling, stopping, options = accepted.sampling, accepted.stopping, accepted.output
        first_position = None if self._continues else accepted.prompt_tokens
        self._outputs = [_Output(first_position) for _ in range(max(1, options.n))]
        self._take_up()
        self.accepted = Accepted(
            sequence=self.sequence,
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
                n=len(self._outputs),
                logprobs=options.logprobs if options.HasField("logprobs") else None,
                prompt_logprobs=(
                    options.prompt_logprobs if options.HasField("prompt_logprobs") else None
                ),
                stream_interval=options.stream_interval,
            ),
            priority=accepted.priority,
            keep=seconds(accepted.keep),
            durable=accepted.durable,
        )
        return self.accepted

    def _take_up(self) -> None:
        """Counts what an earlier reader has received."""
        for cursor in self._received:
            if cursor.output >= len(self._outputs):
                raise self._violation(f"it has no output {cursor.output}, as the cursor says")
            output = self._outputs[cursor.output]
            output.tokens, output.characters = cursor.tokens, cursor.characters
            output.reason = FinishReason.UNKNOWN if cursor.ended else None
        self.is_complete = all(output.reason is not None for output in self._outputs)

    def _prompt_logprobs(self, message: pb.PromptLogprobs) -> PromptLogprobs:
        self._check_position(message.first_position, self._prompt_position)
        self._prompt_position += len(message.logprobs)
        return PromptLogprobs(self.sequence, message.first_position, _logprobs(message.logprobs))

    def _tokens(self, tokens: pb.Tokens, output: int) -> Tokens:
        arrived = self._outputs[output]
        if arrived.first_position is None:
            arrived.first_position = tokens.first_position - arrived.tokens
        self._check_position(tokens.first_position, arrived.first_position + arrived.tokens)
        if tokens.rgb and len(tokens.rgb) != 3 * len(tokens.ids):
            raise self._violation(
                f"event {self.sequence} has {len(tokens.rgb)} bytes of colour "
                f"for {len(tokens.ids)} tokens"
            )
        arrived.tokens += len(tokens.ids)
        arrived.characters += len(tokens.text)
        arrived.last_ids.extend(tokens.ids)
        return Tokens(
            self.sequence,
            tokens.first_position,
            tuple(tokens.ids),
            tokens.text,
            tokens.rgb,
            output,
            _logprobs(tokens.logprobs),
        )

    def _check_position(self, position: int, expected: int) -> None:
        if position != expected:
            raise self._violation(
                f"event {self.sequence} starts at position {position}, {expected} was expected"
            )

    def _failure(self, error: pb.Error) -> Exception:
        if not self.stream_id:
            return refusal(error.code, error.message, error)
        return described(GenerationFailed(error.message, code=error.code), error)

    def _violation(self, what: str) -> ContractViolation:
        stream = f"stream {self.stream_id or '(not accepted)'}"
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


def _logprobs(messages: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(
            one.logprob,
            tuple(one.top_ids),
            tuple(one.top_logprobs),
            one.token,
            one.piece,
            tuple(one.top_tokens),
            tuple(one.top_pieces),
        )
        for one in messages
    )


def _shortest(value: float) -> float:
    # A float32 as the shortest decimal that it stands for: 0.8, not 0.800000011920929.
    return float(f"{value:.7g}")
