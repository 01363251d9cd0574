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

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grpc


class ConcertinaError(Exception):
    """Base of all errors of this package.

    code: name of the gRPC status behind it, for example `NOT_FOUND`; empty if there is none.
    retryable: whether the same request may succeed later.
    retry_after: seconds to wait before that; None if not known.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        retryable: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable
        self.retry_after = retry_after


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


_BY_CODE: dict[str, type[ConcertinaError]] = {
    "UNAVAILABLE": ServerUnavailable,
    "UNAUTHENTICATED": AccessDenied,
    "PERMISSION_DENIED": AccessDenied,
    "NOT_FOUND": ModelNotFound,
    "INVALID_ARGUMENT": InvalidRequest,
    "OUT_OF_RANGE": InvalidRequest,
    "FAILED_PRECONDITION": SessionUnsuitable,
    "DATA_LOSS": SnapshotRefused,
    "RESOURCE_EXHAUSTED": Overloaded,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
}
_RETRYABLE = {"UNAVAILABLE", "RESOURCE_EXHAUSTED"}
_NO_TLS = ("handshake failed", "tsi_", "socket closed", "connection reset")
_NO_CONNECTION = ("failed to connect", "dns resolution failed", "connection refused")


def refusal(
    code: str, message: str, *, retryable: bool | None = None, retry_after: float | None = None
) -> ConcertinaError:
    """The error for a request that is refused with `code`, the name of a gRPC status."""
    kind = _BY_CODE.get(code, ServerError)
    return kind(
        message if kind is not ServerError else f"the server failed with {code}: {message}",
        code=code,
        retryable=code in _RETRYABLE if retryable is None else retryable,
        retry_after=retry_after,
    )


def is_unreachable(code: grpc.StatusCode, details: str) -> bool:
    """Whether a call ended because no connection could be made, so nothing was sent."""
    message = details.lower()
    return code.name == "UNAVAILABLE" and any(phrase in message for phrase in _NO_CONNECTION)


def status_error(address: str, code: grpc.StatusCode, details: str) -> ConcertinaError:
    """The error for a call to `address` that ended with a status other than OK."""
    if code.name == "UNAVAILABLE":
        message = details.lower()
        if "failed to connect" in message and any(phrase in message for phrase in _NO_TLS):
            details = f"{address} and --tls, --ca, --cert here do not fit together ({details})"
        elif any(phrase in message for phrase in _NO_CONNECTION):
            details = (
                f"no Concertina server answers at {address}; start one with `concertina serve`"
            )
        else:
            details = f"the server at {address} is unavailable: {details}"
    elif code.name == "DEADLINE_EXCEEDED":
        details = f"the server at {address} did not finish within the timeout of the call"
    elif code.name == "UNIMPLEMENTED":
        details = f"the server at {address} does not speak concertina.v1 ({details})"
    return refusal(code.name, details)


def session_error(address: str, code: grpc.StatusCode, details: str) -> ConcertinaError:
    """The error for a call about a session that ended with a status other than OK."""
    if code.name == "NOT_FOUND":
        return SessionNotFound(details, code=code.name)
    return status_error(address, code, details)
