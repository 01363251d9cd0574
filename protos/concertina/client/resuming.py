"""How a stream goes on when a call breaks: what to ask next, how long to wait, when to give up.

Nothing here does I/O: the blocking and the asyncio stream make the calls that are asked for here.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import grpc
from tenacity import (
    RetryCallState,
    retry_if_exception_type,
    stop_before_delay,
    wait_random_exponential,
)

from concertina.client.errors import (
    ConcertinaError,
    StreamCut,
    is_unreachable,
    refusal,
    session_error,
    status_error,
)
from concertina.client.event_reader import EventReader, seconds
from concertina.client.events import Event
from concertina.client.requests import GenerateParameters, generate_request
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import session_service_pb2 as session_pb

if TYPE_CHECKING:
    from concertina.client.requests import PromptLike

StreamRequest: TypeAlias = pb.GenerateRequest | pb.ResumeRequest | session_pb.ContinueRequest
Farewell: TypeAlias = session_pb.DeleteRequest | session_pb.PauseRequest

DEFAULT_KEEP_S: Final = 60.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0

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
# In a NOT_FOUND of Ray's own proxy, which stands in while no replica of ours is there.
_RAY_WITHOUT_US = "RayServeAPIService"
_NOT_DURABLE = (
    "the replica that held it is gone, and the stream was not durable: serve with --snapshots, "
    "and streams survive that"
)


class CallBroken(Exception):
    """A call ended before its stream. error: what it comes to, if the stream does not go on."""

    def __init__(self, error: ConcertinaError) -> None:
        super().__init__(str(error))
        self.error = error


def begin(
    address: str,
    prompt: PromptLike | None,
    parameters: GenerateParameters,
    timeout: float | None,
    keep: float | None,
    resume_for: float | None,
) -> Resumption:
    """A stream to generate, as `Client.generate` describes it. Raises InvalidRequest."""
    keep_s = DEFAULT_KEEP_S if keep is None else keep
    return Resumption(
        address,
        generate_request(prompt, parameters, keep_s),
        timeout=timeout,
        resume_for=keep_s if resume_for is None else resume_for,
        forget=keep is None,
    )


class Resumption:
    """One stream over several calls: the first, and those that went on with it.

    request: of the first call. timeout: seconds that all calls together may take.
    resume_for: seconds without any event after which to give up.
    forget: whether a stream that ended well shall leave nothing on the server.
    """

    def __init__(
        self,
        address: str,
        request: pb.GenerateRequest | session_pb.ContinueRequest,
        *,
        timeout: float | None,
        resume_for: float,
        forget: bool,
    ) -> None:
        self.resumed = 0
        self._address = address
        self._request = request
        self._deadline = None if timeout is None else monotonic() + timeout
        self._resume_for = resume_for
        self._forget = forget
        self._reader = EventReader(address, isinstance(request, session_pb.ContinueRequest))
        self._calls = 0
        self._is_fresh = True  # nothing has come by this call
        self._displaced = False

    def next_call(self) -> tuple[StreamRequest, float | None]:
        """What to ask now, and the call's timeout. Raises DeadlineExceeded."""
        remaining = self._remaining()
        self._calls += 1
        self._is_fresh = True
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
        if self._is_fresh and self._calls > 1:
            self.resumed += 1
        self._is_fresh = False
        return event

    def end(self, code: grpc.StatusCode, details: str) -> None:
        """What the end of a call means: nothing if the stream is over.

        Raises CallBroken where the stream may go on, or the error that it ends with.
        """
        error = self._reader.end(code, details)
        if error is None:
            return
        if self._may_go_on(code, details):
            raise CallBroken(error)
        if code is grpc.StatusCode.ABORTED:
            self._displaced = True
        if code is grpc.StatusCode.NOT_FOUND and self._calls > 1 and not self._is_durable:
            raise self._cut(code.name, _NOT_DURABLE)
        if self._reader.accepted is None and isinstance(self._request, session_pb.ContinueRequest):
            raise session_error(self._address, code, details)
        raise error

    def policy(self) -> dict[str, Any]:
        """When to try again, in tenacity's words: for Retrying and AsyncRetrying."""
        return {
            "retry": retry_if_exception_type(CallBroken),
            "wait": self._wait,
            "stop": stop_before_delay(self._resume_for),
            "reraise": True,
        }

    def given_up(self, broken: CallBroken) -> ConcertinaError:
        """What a stream ends with that did not go on."""
        error = broken.error
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

    def farewell(self) -> Farewell | None:
        """What to tell the server when nobody reads on, so that it holds nothing for us."""
        stream_id = self._reader.stream_id
        if not self._is_kept or self._displaced or self._reader.was_paused:
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

    def _may_go_on(self, code: grpc.StatusCode, details: str) -> bool:
        if self._reader.accepted is not None:
            safe = self._is_kept
        else:  # only with a key does asking again not begin a second stream
            safe = isinstance(self._request, pb.GenerateRequest) and bool(
                self._request.idempotency_key
            )
        if self._calls == 1 and is_unreachable(code, details):
            safe = self._reader.accepted is not None  # nobody is there, and nothing was lost
        if code is grpc.StatusCode.NOT_FOUND and _RAY_WITHOUT_US in details and self._calls > 1:
            return safe
        full = code is grpc.StatusCode.RESOURCE_EXHAUSTED and self._is_fresh and self._calls > 1
        return safe and (full or code in _BROKEN)

    def _check_error(self, error: pb.Error) -> None:
        """Raises CallBroken for an error event that does not end the stream.

        A server that cannot take a stream over now says so in place of its next event; one that
        stops under a durable stream leaves it to the others.
        """
        if error.code == "ABORTED":
            self._displaced = True
        if error.code not in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"):
            return
        if self._is_fresh or (self._is_durable and error.code == "UNAVAILABLE"):
            if not self._may_go_on(grpc.StatusCode[error.code], ""):
                return
            after = seconds(error.retry_after) if error.HasField("retry_after") else None
            raise CallBroken(
                refusal(error.code, error.message, retryable=error.retryable, retry_after=after)
            )

    def _wait(self, state: RetryCallState) -> float:
        """Seconds until the next try: random ones, behind those that the server asks for."""
        broken = state.outcome.exception() if state.outcome else None
        asked = broken.error.retry_after if isinstance(broken, CallBroken) else None
        random_s = wait_random_exponential(_FIRST_WAIT_S, _LONGEST_WAIT_S)(state)
        remaining = self._remaining()
        wait = random_s + (asked or 0.0)
        return wait if remaining is None else min(wait, remaining)

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
