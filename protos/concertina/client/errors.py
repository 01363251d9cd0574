"""The errors that a caller can catch.

ConcertinaError
├── ServerUnavailable     nobody answers, or the server is going away
├── AccessDenied          the key is missing or wrong, or is not for this model
├── ModelNotFound         the server has no model of this name
├── SessionNotFound       the server has no stream of this name, or has forgotten it
├── SessionUnsuitable     the session is in a state that does not allow the call
├── SnapshotRefused       the snapshot is damaged, sealed with another key, or of another bundle
├── InvalidRequest        a parameter or the prompt is wrong; trying again does not help
├── Overloaded            the server refuses the request for now; wait `retry_after` seconds
├── DeadlineExceeded      the `timeout` of the call has passed
├── GenerationFailed      an accepted stream ends with an error event
├── StreamCut             a stream ends without its terminal event, and is not resumed
├── ContractViolation     the server breaks the stream protocol
└── ServerError           any other status
"""

from __future__ import annotations

from concertina.shown import cut


class ConcertinaError(Exception):
    """Base of all errors of this package. Its message is short, whatever was asked.

    code: name of the gRPC status behind it, for example `NOT_FOUND`; empty if there is none.
    retryable: whether the same request may succeed later.
    retry_after: seconds to wait before that; None if not known.
    field: the field of the request that is wrong, for example `sampling.top_p`; empty if none is.
    limit: the bound that its value, its length or its number of items breaks; None if it is none.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        retryable: bool = False,
        retry_after: float | None = None,
        field: str = "",
        limit: float | None = None,
    ) -> None:
        super().__init__(cut(message))
        self.code = code
        self.retryable = retryable
        self.retry_after = retry_after
        self.field = field
        self.limit = limit


class ServerUnavailable(ConcertinaError):
    """Nobody answers at the address, or the server is going away."""


class AccessDenied(ConcertinaError):
    """The API key is missing or wrong, or it is not for this model."""


class ModelNotFound(ConcertinaError):
    """The server has no model of this name."""


class SessionNotFound(ConcertinaError):
    """The server has no stream of this name, or has forgotten it."""


class SessionUnsuitable(ConcertinaError):
    """The session is in a state that does not allow the call."""


class SnapshotRefused(ConcertinaError):
    """The snapshot is damaged, sealed with another key, or of another bundle."""


class InvalidRequest(ConcertinaError):
    """A parameter or the prompt is wrong; trying again does not help."""


class Overloaded(ConcertinaError):
    """The server refuses the request for now."""


class DeadlineExceeded(ConcertinaError):
    """The `timeout` of the call has passed."""


class GenerationFailed(ConcertinaError):
    """An accepted stream ends with an error event."""


class StreamCut(ConcertinaError):
    """A stream ends without its terminal event, and is not resumed.

    stream_id: name of the stream; empty if it was never accepted.
    last_sequence: number of the last event that arrived; 0 for none.
    details: the message of the gRPC status.
    """

    def __init__(self, stream_id: str, last_sequence: int, code: str, details: str) -> None:
        status = f"{code}: {details}" if details else code
        super().__init__(
            f"stream {stream_id or '(not accepted)'} was cut after event {last_sequence} "
            f"without a terminal event (gRPC status {status})",
            code=code,
            retryable=True,
        )
        self.stream_id = stream_id
        self.last_sequence = last_sequence
        self.details = details


class ContractViolation(ConcertinaError):
    """The server breaks the stream protocol; the events so far cannot be trusted."""


class ServerError(ConcertinaError):
    """The server fails in a way that no other class describes."""
