"""How a stream goes on when a call breaks: what to ask next, how long to wait, when to give up.

Nothing here does I/O: the blocking and the asyncio stream make the calls that this plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from random import uniform
from time import monotonic
from typing import Final, TypeAlias

import grpc

from concertina.client.errors import ConcertinaError, StreamCut
from concertina.client.event_reader import EventReader
from concertina.client.events import Cursor, Event
from concertina.client.parameters import GenerateParameters
from concertina.client.requests import PromptLike, generate_request, resume_request
from concertina.client.statuses import (
    is_too_large,
    is_unreachable,
    is_without_replica,
    refusal,
    session_error,
    status_error,
)
from concertina.client.times import patience_seconds, timeout_seconds
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import session_service_pb2 as session_pb

StreamRequest: TypeAlias = pb.GenerateRequest | pb.ResumeRequest | session_pb.ContinueRequest
Release: TypeAlias = session_pb.DeleteRequest | session_pb.PauseRequest

DEFAULT_KEEP_S: Final = 60.0
FIRST_WAIT_S = 0.1  # the longest wait before the first try; it doubles from try to try
_LONGEST_WAIT_S: Final = 5.0
_MOST_DOUBLINGS: Final = 16

# What a lost connection, a dying server, or a proxy between may end a call with.
_BROKEN = frozenset(
    {
        grpc.StatusCode.OK,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
    }
)
_NOT_DURABLE = (
    "the replica that held it is gone, and the stream was not durable: serve with --snapshots, "
    "and streams survive that"
)


class CallBroken(Exception):
    """A call ended before its stream. error: what to raise if the stream does not go on."""

    def __init__(self, error: ConcertinaError) -> None:
        super().__init__(str(error))
        self.error = error


class _State(Enum):
    STARTING = auto()  # the first call is made; no event has arrived
    READING = auto()  # the current call sends events
    RESUMING = auto()  # a later call is made; no event has arrived by it
    TAKEN = auto()  # another reader has taken the stream over


def begin(
    address: str,
    prompt: PromptLike | None,
    parameters: GenerateParameters,
    timeout: float | None,
    keep: float | None,
    resume_for: float | None,
) -> Resumption:
    """A stream to generate, as `Client.generate` describes it. Raises InvalidRequest, TypeError."""
    keep_s = DEFAULT_KEEP_S if keep is None else patience_seconds("keep", keep)
    return Resumption(
        address,
        generate_request(prompt, parameters, keep_s),
        timeout=timeout,
        resume_for=keep_s if resume_for is None else resume_for,
        forget=keep is None,
    )


def take_up(
    address: str,
    stream_id: str,
    received: Sequence[Cursor],
    timeout: float | None,
    resume_for: float,
) -> Resumption:
    """The rest of a stream, as `Client.resume` describes it. Raises InvalidRequest."""
    return Resumption(
        address,
        resume_request(stream_id, received),
        timeout=timeout,
        resume_for=resume_for,
        forget=False,
        received=received,
    )


class Resumption:
    """One stream over several calls: the first, and those that resume it.

    request: of the first call. timeout: seconds that all calls together may take.
    resume_for: seconds without any event after which to give up.
    forget: whether the server keeps nothing of a stream that ended well.
    received: what an earlier reader has of each output.
    resumed: how many times the stream went on in another call.
    """

    def __init__(
        self,
        address: str,
        request: StreamRequest,
        *,
        timeout: float | None,
        resume_for: float,
        forget: bool,
        received: Sequence[Cursor] = (),
    ) -> None:
        self.resumed = 0
        self._address = address
        self._request = request
        timeout_s = timeout_seconds(timeout)
        self._deadline = None if timeout_s is None else monotonic() + timeout_s
        self._resume_for = patience_seconds("resume_for", resume_for)
        self._forget = forget
        begins = isinstance(request, pb.GenerateRequest)
        self._reader = EventReader(address, not begins, received)
        self._state = _State.STARTING
        self._failures = 0  # calls that broke since the last event
        self._broken_since = 0.0  # when the first of them did

    def first_call(self) -> tuple[StreamRequest, float | None]:
        """The request to start with, and the call's timeout. Raises DeadlineExceeded."""
        return self._request, self._remaining()

    def next_call(self) -> tuple[StreamRequest, float | None]:
        """The request to go on with, and the call's timeout. Raises DeadlineExceeded."""
        remaining = self._remaining()
        self._state = _State.RESUMING
        if self._reader.accepted is None:
            return self._request, remaining
        request = pb.ResumeRequest(
            stream_id=self._reader.stream_id,
            after_sequence=self._reader.sequence,
            cursors=self._reader.cursors(),
        )
        return request, remaining

    def read(self, message: pb.GenerateResponse) -> Event:
        """The event in `message`. Raises CallBroken, and what EventReader.read raises."""
        if message.WhichOneof("event") == "error":
            self._check_error(message.error)
        event = self._reader.read(message)
        if event is None:
            handed_over = self._cut("UNAVAILABLE", "the replica handed the stream over")
            raise CallBroken(handed_over) if self._is_kept else handed_over
        self.resumed += self._state is _State.RESUMING
        self._state = _State.READING
        self._failures = 0
        return event

    def end(self, code: grpc.StatusCode, details: str, told: pb.Error | None = None) -> None:
        """Takes note that the call ended with this status; does nothing if the stream is over.

        Raises CallBroken where the stream may go on, or else the error that it ends with.
        """
        error = self._reader.end(code, details, told)
        if error is None:
            return
        if self._may_go_on(code, details):
            raise CallBroken(error)
        if (
            code is grpc.StatusCode.NOT_FOUND
            and self._state is _State.RESUMING
            and not self._is_durable
        ):
            raise self._cut(code.name, _NOT_DURABLE)
        if code is grpc.StatusCode.ABORTED:
            self._state = _State.TAKEN
        if self._reader.accepted is None and not isinstance(self._request, pb.GenerateRequest):
            raise session_error(self._address, code, details, told)
        raise error

    def wait_s(self, broken: CallBroken) -> float:
        """Seconds to wait before the next call: random ones, after those the server asks for.

        Raises the error that the stream ends with once it has not gone on for too long, and
        DeadlineExceeded.
        """
        now = monotonic()
        if self._failures == 0:
            self._broken_since = now
        longest = min(FIRST_WAIT_S * 2 ** min(self._failures, _MOST_DOUBLINGS), _LONGEST_WAIT_S)
        self._failures += 1
        wait = uniform(0, longest) + (broken.error.retry_after or 0.0)
        remaining = self._remaining()
        if remaining is not None:
            wait = min(wait, remaining)
        if now - self._broken_since + wait >= self._resume_for:
            raise self._given_up(broken.error) from None
        return wait

    def release(self) -> Release | None:
        """What to ask of the server when nobody reads on, so that it holds nothing for us."""
        stream_id = self._reader.stream_id
        if not self._is_kept or self._state is _State.TAKEN or self._reader.was_paused:
            return None
        if self._reader.is_complete:
            return session_pb.DeleteRequest(stream_id=stream_id) if self._forget else None
        if isinstance(self._request, session_pb.ContinueRequest):
            return session_pb.PauseRequest(stream_id=stream_id)
        return session_pb.DeleteRequest(stream_id=stream_id)

    @property
    def _is_kept(self) -> bool:
        return self._reader.accepted is not None and self._reader.accepted.keep > 0

    @property
    def _is_durable(self) -> bool:
        return self._reader.accepted is not None and self._reader.accepted.durable

    @property
    def _is_resumable(self) -> bool:
        """Whether another call takes up this stream, and does not begin a second one."""
        if self._reader.accepted is not None:
            return self._is_kept
        if isinstance(self._request, pb.ResumeRequest):
            return True
        return isinstance(self._request, pb.GenerateRequest) and bool(self._request.idempotency_key)

    def _may_go_on(self, code: grpc.StatusCode, details: str) -> bool:
        """Whether the stream may go on after a call that ended with this status."""
        if not self._is_resumable:
            return False
        if self._state is _State.STARTING and is_unreachable(code, details):
            return False  # nobody is there, and nothing was lost
        if code in _BROKEN:
            return True
        if self._state is not _State.RESUMING:
            return False
        full = code is grpc.StatusCode.RESOURCE_EXHAUSTED and not is_too_large(code, details)
        return full or is_without_replica(code, details)

    def _check_error(self, error: pb.Error) -> None:
        """Raises CallBroken for an error event that ends the call, but not the stream.

        A server that cannot take a stream over now sends it as the first event of the call; one
        that stops under a durable stream sends it too, and another replica goes on.
        """
        if error.code == "ABORTED":
            self._state = _State.TAKEN
        if error.code not in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"):
            return
        stops = error.code == "UNAVAILABLE" and self._is_durable
        if self._state is _State.READING and not stops:
            return
        if self._may_go_on(grpc.StatusCode[error.code], ""):
            raise CallBroken(refusal(error.code, error.message, error))

    def _given_up(self, error: ConcertinaError) -> ConcertinaError:
        """The error of a stream that did not go on after this one."""
        reason = f"it did not go on within {self._resume_for:g} s"
        if isinstance(error, StreamCut):
            return self._cut(error.code, f"{error.details}; {reason}".removeprefix("; "))
        if self._reader.accepted is not None:
            return self._cut(error.code, f"{error}; {reason}")
        return type(error)(
            f"{error}; {reason}",
            code=error.code,
            retryable=error.retryable,
            retry_after=error.retry_after,
        )

    def _remaining(self) -> float | None:
        """Seconds until the caller's timeout. Raises DeadlineExceeded."""
        if self._deadline is None:
            return None
        remaining = self._deadline - monotonic()
        if remaining <= 0:
            raise status_error(self._address, grpc.StatusCode.DEADLINE_EXCEEDED, "")
        return remaining

    def _cut(self, code: str, details: str) -> StreamCut:
        return StreamCut(self._reader.stream_id, self._reader.sequence, code, details)
