"""What every handler needs: the caller's engine, the way a stream is sent, and how to refuse.

A handler never lets an exception out, since some homes would send its text to the client: a refused
request ends by status, a stream that was accepted ends by an event.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Protocol

import grpc

from concertina.v1 import generation_service_pb2 as pb
from server.api.convert import accepted_message, error_message, response_message
from server.auth.api_keys import Caller
from server.engine.engine import Engine
from server.engine.events import HandedOver
from server.errors import PermissionDenied, RequestError, StepFailed, UnknownModel
from server.sessions.registry import Following
from server.sessions.subscriber import Reader

_log = logging.getLogger(__name__)
_INTERNAL = "internal error; see the server's log"


class Context(Protocol):
    """What handlers use of a call's context: the part that grpc.aio and Ray Serve share."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        """What the client sent beside the request."""

    def set_code(self, code: grpc.StatusCode) -> None:
        """Status of the call."""

    def set_details(self, details: str) -> None:
        """Its message."""


async def send(
    following: Following, sequence: int, durable: bool
) -> AsyncGenerator[pb.GenerateResponse]:
    """The events behind number `sequence` of a stream that is followed, until all outputs ended."""
    engine, session, told = following.engine, following.session, set[Reader]()
    readers = dict(zip(session.streams, following.readers, strict=True))
    try:
        if not sequence:
            sequence = 1
            accepted = accepted_message(engine.bundle, session, durable)
            yield pb.GenerateResponse(sequence=sequence, accepted=accepted)
        async for stream, event in engine.events_together(session.streams, following.readers):
            response = response_message(engine.bundle, stream.request, event, sequence + 1)
            sequence += 1
            yield response
            if isinstance(event, HandedOver):
                return
            if readers[stream].is_over:
                told.add(readers[stream])
    except Exception as error:
        if isinstance(error, grpc.RpcError):  # the client is gone; there is nobody to tell
            raise
        _log.exception("stream %s failed", session.terms.stream_id)
        for reader in following.readers:
            if reader not in told and not reader.received.ended:
                sequence += 1
                failed = StepFailed(_INTERNAL)
                yield response_message(engine.bundle, reader.request, failed, sequence)
    finally:
        engine.leave(session, following.readers)


def refusal(error: Exception, sequence: int = 0) -> pb.GenerateResponse | None:
    """What is sent in-band before a stream is refused for now."""
    if isinstance(error, RequestError) and error.retryable:
        return pb.GenerateResponse(sequence=sequence + 1, error=error_message(error))
    return None


def visible(engines: Mapping[str, Engine], caller: Caller) -> dict[str, Engine]:
    """The engines that the caller may use."""
    return {name: engine for name, engine in engines.items() if caller.may_use(name)}


def find(engines: Mapping[str, Engine], caller: Caller, name: str) -> Engine:
    """The engine of that name, or the only one. Raises UnknownModel, PermissionDenied."""
    seen = visible(engines, caller)
    if name in seen:
        return seen[name]
    known = ", ".join(sorted(seen)) or "none"
    if name and not caller.may_use(name):  # the same whether it is served or not
        reason = f"key {caller.name!r} is not for model {name[:100]!r}"
        raise PermissionDenied(f"{reason}; of those served, it is for: {known}")
    if name:
        raise UnknownModel(f"model {name[:100]!r} is not served here; these are: {known}")
    if not engines:
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
        error = StepFailed(_INTERNAL)
    context.set_code(error.code)
    context.set_details(error.message)
