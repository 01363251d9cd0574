"""Which error a call ends with, by its gRPC status.

A status may be of our server or of the transport: gRPC on either side, HAProxy, Ray. Those of the
transport mean what their words say, not what our server means by the same code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError

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
from concertina.v1 import generation_service_pb2 as pb

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
_LIMIT: Final = re.compile(r" vs\. (\d+)\)")
_ANSWER_TOO_LARGE = "client: received message larger than max"
# In a NOT_FOUND of Ray's own proxy, which answers while no replica of ours does.
_RAY_WITHOUT_US = "RayServeAPIService"
_ERROR_KEY: Final = "concertina-error-bin"


def refusal(code: str, message: str, told: pb.Error | None = None) -> ConcertinaError:
    """The error for a request that is refused with `code`, the name of a gRPC status.

    told: what our server says besides; None for a status that is not of our server.
    """
    kind = _BY_CODE.get(code, ServerError)
    error = kind(
        message if kind is not ServerError else f"the server failed with {code}: {message}",
        code=code,
        retryable=code in _RETRYABLE,
    )
    return error if told is None else described(error, told)


def described(error: ConcertinaError, told: pb.Error) -> ConcertinaError:
    """The error, with what our server says about it."""
    error.retryable, error.field = told.retryable, told.field
    error.retry_after = seconds(told.retry_after) if told.HasField("retry_after") else None
    error.limit = told.limit if told.HasField("limit") else None
    return error


def seconds(duration: Duration) -> float:
    """A protobuf duration in seconds."""
    return duration.seconds + duration.nanos / 1e9


def told_by(metadata: Iterable[Any] | None) -> pb.Error | None:
    """The error in the trailing metadata of a call; None if our server did not send one."""
    for key, value in metadata or ():
        if key == _ERROR_KEY and isinstance(value, bytes):
            try:
                return pb.Error.FromString(value)
            except DecodeError:
                return None
    return None


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


def status_error(
    address: str, code: grpc.StatusCode, details: str, told: pb.Error | None = None
) -> ConcertinaError:
    """The error for a call to `address` that ended with a status other than OK.

    told: what our server sent with the status, if it did.
    """
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
        limit = _LIMIT.search(details)
        return InvalidRequest(
            f"the request is too large for {at} ({details})",
            code=code.name,
            limit=int(limit[1]) if limit else None,
        )
    if code.name == "UNAVAILABLE":
        return refusal(code.name, _unavailable(address, at, details), told)
    if code.name == "UNAUTHENTICATED":
        details += "; here: Client(key=…), CONCERTINA_KEY, or --key-file on the command line"
    elif code.name == "DEADLINE_EXCEEDED":
        details = f"the server at {at} did not finish within the timeout of the call"
    elif code.name == "UNIMPLEMENTED":
        details = f"the server at {at} does not speak concertina.v1 ({details})"
    return refusal(code.name, details, told)


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


def session_error(
    address: str, code: grpc.StatusCode, details: str, told: pb.Error | None = None
) -> ConcertinaError:
    """The error for a call about a session that ended with a status other than OK."""
    if code.name == "NOT_FOUND" and not is_without_replica(code, details):
        return SessionNotFound(details, code=code.name)
    return status_error(address, code, details, told)
