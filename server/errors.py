"""Errors that callers and operators see.

BundleError             a bundle that cannot be served; ends the start
KeysError               a keys file that cannot be used; ends the start
RequestError            ends one request; carries its gRPC status
├── Unauthenticated     UNAUTHENTICATED     the caller has no key that this server knows
├── PermissionDenied    PERMISSION_DENIED   the key is not for this model
├── InvalidRequest      INVALID_ARGUMENT    the caller must change the request
├── UnknownModel        NOT_FOUND           this server has no such model
├── Overloaded          RESOURCE_EXHAUSTED  the same request may succeed later
├── QuotaExceeded       RESOURCE_EXHAUSTED  it may succeed once other streams of this key end
├── EngineStopped       UNAVAILABLE         this server is shutting down
├── StepFailed          INTERNAL            the server failed; details are in its log
├── StorageFailed       UNAVAILABLE         snapshots cannot be written or read
├── UnknownSession      NOT_FOUND           there is no such stream, or it is deleted
├── SnapshotRefused     DATA_LOSS           the snapshot cannot be used
├── Unsuitable          FAILED_PRECONDITION the session is in the wrong phase for the call
└── Displaced           ABORTED             another reader has resumed the stream
"""

from __future__ import annotations

from typing import ClassVar

from concertina.shown import cut


class BundleError(Exception):
    """A bundle that cannot be served. The message names the file, the reason and the remedy."""


class KeysError(ValueError):
    """A keys file, or a key, that cannot be used. The message names it and the reason."""


class RequestError(Exception):
    """A request that ends with an error.

    `status` (the name of a gRPC status), `message` and `retry_after_s` (seconds until the same
    request may succeed, None where nobody knows) are sent to the client unchanged. A message is
    short, whatever was asked.

    field, limit: of the request, what is wrong, and the bound that it breaks if it is a number.
    """

    status: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False
    usual_wait_s: ClassVar[float | None] = None

    def __init__(
        self,
        message: str,
        retry_after_s: float | None = None,
        *,
        field: str = "",
        limit: float | None = None,
    ) -> None:
        self.field, self.limit = field, limit
        self.message = cut(message)
        super().__init__(self.message)
        self.retry_after_s = self.usual_wait_s if retry_after_s is None else retry_after_s


class Unauthenticated(RequestError):
    """The call has no key that this server knows."""

    status = "UNAUTHENTICATED"


class PermissionDenied(RequestError):
    """The key does not allow this model, whether it is served or not."""

    status = "PERMISSION_DENIED"


class InvalidRequest(RequestError):
    """A field has a value that is not allowed; the message names field, value and limit."""

    status = "INVALID_ARGUMENT"


class UnknownModel(RequestError):
    """No bundle of this name is served."""

    status = "NOT_FOUND"


class Overloaded(RequestError):
    """The engine is full: the queue, its prompt tokens, or the state of its streams."""

    status = "RESOURCE_EXHAUSTED"
    retryable = True


class QuotaExceeded(RequestError):
    """The key has as many streams as it is allowed."""

    status = "RESOURCE_EXHAUSTED"
    retryable = True


class EngineStopped(RequestError):
    """The engine is shutting down, or has died."""

    status = "UNAVAILABLE"
    retryable = True
    usual_wait_s = 0.1  # another replica may take it at once


class StepFailed(RequestError):
    """A pass of the model failed."""

    status = "INTERNAL"
    retryable = True


class UnknownSession(RequestError):
    """No session of this name belongs to the caller, in this process or in the store."""

    status = "NOT_FOUND"


class SnapshotRefused(RequestError):
    """A snapshot that cannot be used; the message names the reason: truncated, expired, …"""

    status = "DATA_LOSS"


class Unsuitable(RequestError):
    """The call does not work on this session: it runs, has failed, or has several outputs."""

    status = "FAILED_PRECONDITION"


class Displaced(RequestError):
    """Another reader has resumed the stream."""

    status = "ABORTED"


class StorageFailed(RequestError):
    """The snapshot store does not answer or is full."""

    status = "UNAVAILABLE"
    retryable = True
    usual_wait_s = 1.0  # as long as the server waits, before it tries the store for the second time
