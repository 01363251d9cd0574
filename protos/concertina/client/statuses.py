"""Which error a call ends with, by its gRPC status.

A status may be of our server or of the transport: gRPC on either side, HAProxy, Ray. Those of the
transport mean what their words say, not what our server means by the same code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from concertina.addresses import host_of, proxy_before
from concertina.client.errors import (
    AccessDenied,
    ConcertinaError,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    ServerError,
    ServerUnavailable,
    SessionNotFound,
    SessionUnsuitable,
    SnapshotRefused,
)

if TYPE_CHECKING:
    import grpc

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
_OTHER_NAME = "hostname verification check failed"
_NO_CONNECTION = ("failed to connect", "dns resolution failed", "connection refused")
# Of gRPC itself, here or there; what our server refuses has other words.
_TOO_LARGE = ("message larger than max", "metadata size exceeds")
_ANSWER_TOO_LARGE = "client: received message larger than max"
# In a NOT_FOUND of Ray's own proxy, which answers while no replica of ours does.
_RAY_WITHOUT_US = "RayServeAPIService"


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


def is_without_replica(code: grpc.StatusCode, details: str) -> bool:
    """Whether Ray answered in place of a replica of ours, since there is none for now."""
    return code.name == "NOT_FOUND" and _RAY_WITHOUT_US in details


def is_too_large(code: grpc.StatusCode, details: str) -> bool:
    """Whether gRPC itself refused a message for its size. The same message never passes."""
    message = details.lower()
    return code.name == "RESOURCE_EXHAUSTED" and any(phrase in message for phrase in _TOO_LARGE)


def status_error(address: str, code: grpc.StatusCode, details: str) -> ConcertinaError:
    """The error for a call to `address` that ended with a status other than OK."""
    proxy = proxy_before(address)
    at = f"{address}, reached by the proxy {proxy}," if proxy else address
    if is_without_replica(code, details):
        return ServerUnavailable(
            f"the server at {at} has no replica that answers now; try again later",
            code=code.name,
            retryable=True,
        )
    if is_too_large(code, details):
        if _ANSWER_TOO_LARGE in details.lower():
            return ServerError(f"the answer of {at} is too large to be read ({details})")
        return InvalidRequest(f"the request is too large for {at} ({details})", code=code.name)
    if code.name == "UNAVAILABLE":
        return refusal(code.name, _unavailable(address, at, details))
    if code.name == "UNAUTHENTICATED":
        details += "; here: Client(key=…), CONCERTINA_KEY, or --key-file on the command line"
    elif code.name == "DEADLINE_EXCEEDED":
        details = f"the server at {at} did not finish within the timeout of the call"
    elif code.name == "UNIMPLEMENTED":
        details = f"the server at {at} does not speak concertina.v1 ({details})"
    return refusal(code.name, details)


def _unavailable(address: str, at: str, details: str) -> str:
    message = details.lower()
    if "failed to connect" in message and any(phrase in message for phrase in _NO_TLS):
        return f"{at} and --tls, --ca, --cert here do not fit together ({details})"
    if _OTHER_NAME in message:
        return f"the certificate of {at} is for other names: use one of them in the address"
    if not any(phrase in message for phrase in _NO_CONNECTION):
        return f"the server at {at} is unavailable: {details}"
    if at != address:
        without = f"no_proxy={host_of(address)} goes there without it"
        return f"no Concertina server answers at {at} ({details}); {without}"
    return f"no Concertina server answers at {address}; start one with `concertina serve`"


def session_error(address: str, code: grpc.StatusCode, details: str) -> ConcertinaError:
    """The error for a call about a session that ended with a status other than OK."""
    if code.name == "NOT_FOUND" and not is_without_replica(code, details):
        return SessionNotFound(details, code=code.name)
    return status_error(address, code, details)
