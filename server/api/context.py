"""What every handler needs of a call: who calls, for which model, and how to refuse.

A handler never lets an exception out, since some hosts would send its text to the client.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Iterable, Mapping
from typing import Protocol, TypeVar

import grpc

from server.auth.api_keys import Caller, Callers
from server.errors import PermissionDenied, RequestError, StepFailed, UnknownModel
from server.sessions.served_model import ServedModel

_log = logging.getLogger(__name__)
INTERNAL = "internal error; see the server's log"

_Response = TypeVar("_Response")


class Context(Protocol):
    """What handlers use of a call's context: the part that grpc.aio and Ray Serve share."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        """What the client sent beside the request."""

    def set_code(self, code: grpc.StatusCode) -> None:
        """Status of the call."""

    def set_details(self, details: str) -> None:
        """Its message."""


def caller_of(callers: Callers, context: Context) -> Caller:
    """Who makes the call. Raises Unauthenticated."""
    return callers.of(context.invocation_metadata())


def visible(models: Mapping[str, ServedModel], caller: Caller) -> dict[str, ServedModel]:
    """The models that the caller may use."""
    return {name: model for name, model in models.items() if caller.may_use(name)}


def find(models: Mapping[str, ServedModel], caller: Caller, name: str) -> ServedModel:
    """The model of that name, or the only one. Raises UnknownModel, PermissionDenied."""
    seen = visible(models, caller)
    if name in seen:
        return seen[name]
    known = ", ".join(sorted(seen)) or "none"
    if name and not caller.may_use(name):  # the same whether it is served or not
        reason = f"key {caller.name!r} is not for model {name[:100]!r}"
        raise PermissionDenied(f"{reason}; of those served, it is for: {known}")
    if name:
        raise UnknownModel(f"model {name[:100]!r} is not served here; these are: {known}")
    if not models:
        raise UnknownModel("no model is served here yet; try again later")
    if not seen:
        raise PermissionDenied(f"key {caller.name!r} is for none of the models served here")
    if len(seen) > 1:
        raise UnknownModel(f"model is empty, and several are served: choose one of {known}")
    return next(iter(seen.values()))


def refuse(context: Context, error: Exception) -> None:
    """End a call with the status of `error`."""
    if not isinstance(error, RequestError):
        _log.error("a request failed", exc_info=error)
        error = StepFailed(INTERNAL)
    context.set_code(grpc.StatusCode[error.status])
    context.set_details(error.message)


async def answer(context: Context, response: Awaitable[_Response]) -> _Response | None:
    """The response of a call, or its refusal."""
    try:
        return await response
    except Exception as error:
        refuse(context, error)
        return None
