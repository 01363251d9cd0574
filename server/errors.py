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
└── StepFailed          INTERNAL            our fault; details are in the log
"""

from __future__ import annotations

import grpc


class BundleError(Exception):
    """A bundle that cannot be served. The message names the file, the reason and the remedy."""


class KeysError(ValueError):
    """A keys file, or a key, that cannot be used. The message names it, and says why."""


class RequestError(Exception):
    """A request that ends with an error. `code` and `message` go to the client as they are."""

    code = grpc.StatusCode.INTERNAL
    retryable = False

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class Unauthenticated(RequestError):
    """The call carries no key that is known here."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(RequestError):
    """The key is not for this model, served or not."""

    code = grpc.StatusCode.PERMISSION_DENIED


class InvalidRequest(RequestError):
    """A field has a value that is not allowed; the message names both and the limit."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class UnknownModel(RequestError):
    """No bundle of that name is served."""

    code = grpc.StatusCode.NOT_FOUND


class Overloaded(RequestError):
    """The queue is full."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True


class QuotaExceeded(RequestError):
    """The key has as many streams as it may."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True


class EngineStopped(RequestError):
    """The engine is shutting down, or has died."""

    code = grpc.StatusCode.UNAVAILABLE
    retryable = True


class StepFailed(RequestError):
    """A pass of the model failed."""

    code = grpc.StatusCode.INTERNAL
    retryable = True
