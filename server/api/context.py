"""What all handlers use: the caller, the model, and how to refuse a call.

A handler never raises, since some hosts send the text of an exception to the client.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from concertina.shown import listed, shown
from concertina.v1 import generation_service_pb2 as pb
from server.api.details import refusal_metadata
from server.api.limits import require_within_limits
from server.auth.api_keys import Caller, Callers
from server.errors import PermissionDenied, RequestError, StepFailed, UnknownModel
from server.ops.metrics import CALLS
from server.sessions.served_model import ServedModel

_log = logging.getLogger(__name__)
INTERNAL = "internal error; see the server's log"

_Response = TypeVar("_Response")
_COMPILER = ThreadPoolExecutor(1, "grammars")


class Context(Protocol):
    """The part of a call's context that grpc.aio and Ray Serve share."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        """Metadata that the client sent with the request."""

    def set_code(self, code: grpc.StatusCode) -> None:
        """Set the status of the call."""

    def set_details(self, details: str) -> None:
        """Set the message of the status."""

    def set_trailing_metadata(self, trailing_metadata: list[Any]) -> None:
        """Set what is sent with the status."""


def caller_of(callers: Callers, context: Context) -> Caller:
    """The caller, from the metadata of the call. Raises Unauthenticated."""
    return callers.of(context.invocation_metadata())


def admitted(callers: Callers, context: Context, request: Message) -> Caller:
    """The caller of a call whose request is within its limits. Every handler begins with this.

    Raises Unauthenticated, and InvalidRequest with field, value and limit.
    """
    caller = caller_of(callers, context)
    require_within_limits(request)
    return caller


async def off_loop(
    is_long: bool, work: Callable[..., _Response], *arguments: Any, compiles: bool = False
) -> _Response:
    """What `work` returns. If it is long, another thread does it, so that the loop goes on.

    compiles: it may compile a grammar. One thread does all of these, so that many requests with
    grammars that take long hold up each other, and no thread that the others need.
    """
    if compiles:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(_COMPILER, partial(work, *arguments))
    return await asyncio.to_thread(work, *arguments) if is_long else work(*arguments)


def visible(models: Mapping[str, ServedModel], caller: Caller) -> dict[str, ServedModel]:
    """The models that the caller may use, by name."""
    return {name: model for name, model in models.items() if caller.may_use(name)}


def find(
    models: Mapping[str, ServedModel], caller: Caller, name: str, prompt: pb.Prompt | None = None
) -> ServedModel:
    """The model of this name; if `name` is empty, the only model, or the only one for this prompt.

    Raises UnknownModel, PermissionDenied.
    """
    usable = visible(models, caller)
    if name in usable:
        return usable[name]
    names = listed(sorted(usable)) or "none"
    if name and not caller.may_use(name):  # must not show whether the model is served
        reason = f"key {caller.name!r} is not for model {shown(name)}"
        raise PermissionDenied(f"{reason}; of those served, it is for: {names}", field="model")
    if name:
        raise UnknownModel(
            f"model {shown(name)} is not served here; these are: {names}", field="model"
        )
    if not models:
        raise UnknownModel("no model is served here yet; try again later")
    if not usable:
        raise PermissionDenied(f"key {caller.name!r} is for none of the models served here")
    fitting = [model for model in usable.values() if _fits(model, prompt)]
    if len(fitting) == 1:
        return fitting[0]
    if len(usable) > 1:
        raise UnknownModel(
            f"model is empty, and several are served: choose one of {names}", field="model"
        )
    return next(iter(usable.values()))


def _fits(model: ServedModel, prompt: pb.Prompt | None) -> bool:
    """Whether a prompt is of the kind that the model takes, by its content and its label."""
    content = None if prompt is None else prompt.WhichOneof("content")
    if content == "messages" and model.bundle.chat_template is None:
        return False
    if content not in (None, "tokens", "messages", *model.bundle.codec.takes):
        return False
    if prompt is None or not prompt.HasField("label"):
        return True
    return prompt.label in model.bundle.manifest.labels


def refuse(context: Context, error: Exception) -> None:
    """Set the status of a call to that of `error`. Unexpected errors are logged and hidden."""
    if not isinstance(error, RequestError):
        _log.error("a request failed", exc_info=error)
        error = StepFailed(INTERNAL)
    context.set_code(grpc.StatusCode[error.status])
    context.set_details(error.message)
    context.set_trailing_metadata(refusal_metadata(error))


async def to_the_end(
    work: Awaitable[_Response], unclaimed: Callable[[_Response], None] = lambda _: None
) -> _Response:
    """The result of `work`, which is done to its end even if the caller stops waiting.

    The result that nobody waits for any more goes to `unclaimed`.
    """
    task = asyncio.ensure_future(work)

    def drop(_: object) -> None:
        if not task.cancelled() and task.exception() is None:
            unclaimed(task.result())

    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(drop)
        raise


async def answer(method: str, context: Context, response: Awaitable[_Response]) -> _Response | None:
    """Await the response of a call of a method, and count it.

    If it raises, refuse the call and return None.
    """
    with counting(method, context) as watched:
        try:
            return await response
        except Exception as error:
            refuse(watched, error)
            return None


class _Watched:
    """A context that remembers the status of its call."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.status = "OK"
        self.invocation_metadata = context.invocation_metadata
        self.set_details = context.set_details
        self.set_trailing_metadata = context.set_trailing_metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        """Set the status of the call."""
        self.status = code.name
        self._context.set_code(code)


@contextmanager
def counting(method: str, context: Context) -> Iterator[Context]:
    """Count a call by its status when it ends; the status is to be set on this context."""
    watched, status = _Watched(context), "CANCELLED"
    try:
        yield watched
        status = watched.status
    except Exception:
        status = grpc.StatusCode.UNKNOWN.name
        raise
    finally:
        CALLS.labels(method, status).inc()
