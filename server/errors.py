"""What can go wrong, as seen from outside.

BundleError             a bundle that cannot be served; ends the start
KeysError               a keys file that cannot be used; ends the start
RequestError            ends one request; carries its gRPC status
├── Unauthenticated     UNAUTHENTICATED     the caller has no key that is known here
├── PermissionDenied    PERMISSION_DENIED   the key is not for this model
├── InvalidRequest      INVALID_ARGUMENT    the caller must change the request
├── UnknownModel        NOT_FOUND           no such model here
├── Overloaded          RESOURCE_EXHAUSTED  the same request may succeed later
├── QuotaExceeded       RESOURCE_EXHAUSTED  so it may, once streams of the same key have ended
├── EngineStopped       UNAVAILABLE         this server is going away
├── StepFailed          INTERNAL            our fault; details are in the log
├── StorageFailed       UNAVAILABLE         snapshots cannot be written or read
├── UnknownSession      NOT_FOUND           no such stream, or no longer
├── SnapshotRefused     DATA_LOSS           a snapshot that cannot be used, and why
├── Unsuitable          FAILED_PRECONDITION the session is not in a state for this
└── Displaced           ABORTED             another reader has the stream now
"""

from __future__ import annotations

from typing import ClassVar


class BundleError(Exception):
    """A bundle that cannot be served. The message names the file, the reason and the remedy."""


class KeysError(ValueError):
    """A keys file, or a key, that cannot be used. The message names it, and says why."""


class RequestError(Exception):
    """A request that ends with an error.

    `status`, the name of a gRPC status, and `message` go to the client as they are.
    """

    status: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class Unauthenticated(RequestError):
    """The call carries no key that is known here."""

    status = "UNAUTHENTICATED"


class PermissionDenied(RequestError):
    """The key is not for this model, served or not."""

    status = "PERMISSION_DENIED"


class InvalidRequest(RequestError):
    """A field has a value that is not allowed; the message names both and the limit."""

    status = "INVALID_ARGUMENT"


class UnknownModel(RequestError):
    """No bundle of that name is served."""

    status = "NOT_FOUND"


class Overloaded(RequestError):
    """The queue is full."""

    status = "RESOURCE_EXHAUSTED"
    retryable = True


class QuotaExceeded(RequestError):
    """The key has as many streams as it may."""

    status = "RESOURCE_EXHAUSTED"
    retryable = True


class EngineStopped(RequestError):
    """The engine is shutting down, or has died."""

    status = "UNAVAILABLE"
    retryable = True


class StepFailed(RequestError):
    """A pass of the model failed."""

    status = "INTERNAL"
    retryable = True


class UnknownSession(RequestError):
    """No session of that name is held here or stored, or none of the caller's."""

    status = "NOT_FOUND"


class SnapshotRefused(RequestError):
    """A snapshot that is truncated, expired, foreign or changed; the message says which."""

    status = "DATA_LOSS"


class Unsuitable(RequestError):
    """The session is running, or ended, or has several outputs, where this cannot be."""

    status = "FAILED_PRECONDITION"


class Displaced(RequestError):
    """The same stream was resumed elsewhere."""

    status = "ABORTED"


class StorageFailed(RequestError):
    """The store of the snapshots does not answer, or is full."""

    status = "UNAVAILABLE"
    retryable = True
