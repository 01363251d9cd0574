"""Errors as OpenAI's clients read them: a status, and an object that names the parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from starlette.responses import JSONResponse

from concertina.client import (
    AccessDenied,
    ConcertinaError,
    ContractViolation,
    DeadlineExceeded,
    GenerationFailed,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    ServerUnavailable,
    SessionNotFound,
    SessionUnsuitable,
    StreamCut,
)

_RETRY_S: Final = 1.0
_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# What fields of our messages are called here, where the name alone does not say it.
_PARAMS: Final[Mapping[str, str]] = {
    "include_stop": "include_stop_str_in_output",
    "messages": "messages",
    "tokens": "prompt",
    "text": "prompt",
    "image": "prompt",
    "label": "label",
}


class HttpError(Exception):
    """A call that is refused, or has failed.

    param: the field of the body that is wrong. code: a word for programs. retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The object that clients read."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The answer to the call."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
            headers["retry-after-ms"] = str(max(1, math.ceil(1000 * self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def invalid(param: str, message: str, code: str | None = None) -> HttpError:
    """The error for a field of the body that is wrong."""
    return HttpError(400, message, param=param, code=code)


def error_of(error: Exception) -> HttpError:
    """The same error, as it is told over HTTP."""
    match error:
        case HttpError():
            return error
        case InvalidRequest():
            return _invalid(error)
        case AccessDenied(code="PERMISSION_DENIED"):
            return HttpError(403, str(error), code="permission_denied")
        case AccessDenied():
            told = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
            return HttpError(401, told, code="invalid_api_key")
        case ModelNotFound():
            return HttpError(404, str(error), param="model", code="model_not_found")
        case SessionNotFound():
            return HttpError(404, str(error), code="stream_not_found")
        case SessionUnsuitable():
            return HttpError(409, str(error), code="stream_unsuitable")
        case Overloaded():
            return _later(429, error, "rate_limit_exceeded")
        case ServerUnavailable():
            return _later(503, error, "unavailable")
        case DeadlineExceeded():
            return HttpError(408, str(error), code="timeout")
        case StreamCut(code="NOT_FOUND"):
            return HttpError(404, str(error), code="stream_not_found")
        case StreamCut(code="ABORTED"):
            return HttpError(409, str(error), code="stream_taken")
        case StreamCut():
            return _later(503, error, "stream_cut")
        case GenerationFailed(code="RESOURCE_EXHAUSTED"):
            return _later(429, error, "rate_limit_exceeded")
        case GenerationFailed(code="UNAVAILABLE"):
            return _later(503, error, "unavailable")
        case GenerationFailed(code="INVALID_ARGUMENT"):
            return HttpError(400, str(error))
        case ContractViolation():
            return HttpError(502, str(error), code="contract_violation")
        case ConcertinaError():
            return HttpError(500, str(error), code=error.code.lower() or None)
    return HttpError(500, "internal error; see the gateway's log")


def _later(status: int, error: ConcertinaError, code: str) -> HttpError:
    after = _RETRY_S if error.retry_after is None else error.retry_after
    return HttpError(status, str(error), code=code, retry_after=after)


def _invalid(error: InvalidRequest) -> HttpError:
    param = param_of(error.field)
    too_long = error.field == "prompt" and error.limit is not None
    too_long = too_long or (param == "max_tokens" and "context" in str(error))
    code = "context_length_exceeded" if too_long else None
    message = str(error)
    if param is not None and not error.field.startswith("prompt"):
        message = message.replace(error.field.split("[")[0], param, 1)
    return HttpError(400, message, param=param, code=code)


def param_of(field: str) -> str | None:
    """The name that a field of a request message has in a body: `top_p` for `sampling.top_p`."""
    if not field:
        return None
    path = field.split("[")[0].split(".")
    if path[0] == "prompt" and len(path) > 1:
        return _PARAMS.get(path[1], "prompt")
    return _PARAMS.get(path[-1], path[-1])
