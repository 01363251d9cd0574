"""The RPCs of sessions: Pause, Continue, Fork, Export, Import, Delete and ListSessions."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

from concertina.v1 import generation_service_pb2 as generation_pb
from concertina.v1 import session_service_pb2 as pb
from concertina.v1 import session_service_pb2_grpc as session_grpc
from server.api.context import (
    Context,
    admitted,
    answer,
    caller_of,
    counting,
    off_loop,
    refuse,
    to_the_end,
)
from server.api.continuation import continued
from server.api.generation import stream
from server.api.limits import require_within_limits
from server.api.validate import takes_long
from server.auth.api_keys import Caller, Callers
from server.checkpoint import Finish
from server.errors import (
    Displaced,
    InvalidRequest,
    PermissionDenied,
    UnknownSession,
    Unsuitable,
)
from server.sessions.opener import SessionOpener
from server.sessions.registry import Attachment, SessionRegistry
from server.sessions.reviver import find_or_revive
from server.sessions.served_model import ServedModel
from server.sessions.table import Session
from server.snapshots.claims import AlreadyClaimed
from server.snapshots.writer import SnapshotWriter

_TRIES = 3  # another server may take the stream over meanwhile
_PAGE = 100
_QUICK_TOKENS = 4096


class SessionServicer(session_grpc.SessionServiceServicer):
    """See session_service.proto.

    part_bytes: largest part of an exported snapshot, in bytes.
    """

    part_bytes = 1024 * 1024

    def __init__(self, registry: SessionRegistry, opener: SessionOpener, callers: Callers) -> None:
        self._registry = registry
        self._opener = opener
        self._callers = callers

    async def Pause(self, request: pb.PauseRequest, context: Context) -> pb.PauseResponse | None:
        """Stop a stream and keep its state."""

        async def pause() -> pb.PauseResponse:
            caller = admitted(self._callers, context, request)
            for _ in range(_TRIES):
                model, session = await self._find(request.stream_id, caller)
                if not session.lease.keep_s:
                    raise Unsuitable("the stream is not kept: set keep in its request")
                with suppress(UnknownSession):  # deleted, moved or continued since it was found
                    await model.pause(session)
                    return pb.PauseResponse(session=session_message(model, session))
            raise _unsteady()

        return await answer("Pause", context, to_the_end(pause()))

    async def Continue(
        self, request: pb.ContinueRequest, context: Context
    ) -> AsyncIterator[generation_pb.GenerateResponse]:
        """Continue a paused or finished session."""
        with counting("Continue", context) as watched:
            continuing = self._continue(request, watched)
            async with aclosing(stream(self._registry, continuing, watched)) as responses:
                async for response in responses:
                    yield response

    async def Fork(self, request: pb.ForkRequest, context: Context) -> pb.ForkResponse | None:
        """Copy a paused or finished session."""

        async def fork() -> pb.ForkResponse:
            caller = admitted(self._callers, context, request)
            model, session = await self._find(request.stream_id, caller)
            _require_ended(session)
            copies = await self._opener.copy(model, session, caller, request.n)
            return pb.ForkResponse(stream_ids=copies)

        return await answer("Fork", context, to_the_end(fork()))

    async def Export(
        self, request: pb.ExportRequest, context: Context
    ) -> AsyncIterator[pb.ExportResponse]:
        """Send the sealed snapshot of a paused or finished session, in parts."""
        with counting("Export", context) as watched:
            try:
                sealed = await self._exported(request, watched)
            except Exception as error:
                refuse(watched, error)
                return
            for at in range(0, len(sealed), self.part_bytes):
                last = at + self.part_bytes >= len(sealed)
                digest = hashlib.sha256(sealed).digest() if last else b""
                yield pb.ExportResponse(part=sealed[at : at + self.part_bytes], sha256=digest)

    async def Import(
        self, requests: AsyncIterator[pb.ImportRequest], context: Context
    ) -> pb.ImportResponse | None:
        """Make a session from an exported snapshot."""

        async def adopt() -> pb.ImportResponse:
            caller, snapshots = caller_of(self._callers, context), self._snapshots()
            sealed = await self._received(requests)
            snapshot = await asyncio.to_thread(snapshots.import_, sealed, caller.name)
            _require_model(caller, snapshot.model)
            model, session = await self._opener.adopt(snapshot, caller)
            return pb.ImportResponse(session=session_message(model, session))

        return await answer("Import", context, to_the_end(adopt()))

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteResponse | None:
        """Delete a session."""

        async def delete() -> pb.DeleteResponse:
            caller = admitted(self._callers, context, request)
            await self._registry.delete(request.stream_id, caller.name)
            return pb.DeleteResponse()

        return await answer("Delete", context, to_the_end(delete()))

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: Context
    ) -> pb.ListSessionsResponse | None:
        """A page of the caller's sessions."""

        async def list_sessions() -> pb.ListSessionsResponse:
            caller = admitted(self._callers, context, request)
            size = request.page_size or _PAGE
            found = {
                session.lease.stream_id: session_message(model, session)
                for model in self._registry.holders
                for session in model.sessions(caller.name)
            }
            for stream_id in await self._registry.stored(caller.name):
                stored = pb.Session(stream_id=stream_id, phase=pb.SESSION_PHASE_STORED)
                found.setdefault(stream_id, stored)
            names = sorted(name for name in found if name > request.page_token)
            return pb.ListSessionsResponse(
                sessions=[found[name] for name in names[:size]],
                next_page_token=names[size - 1] if len(names) > size else "",
            )

        return await answer("ListSessions", context, list_sessions())

    async def _exported(self, request: pb.ExportRequest, context: Context) -> bytes:
        caller = admitted(self._callers, context, request)
        model, session = await self._find(request.stream_id, caller)
        _require_ended(session)
        snapshots, checkpoints = self._snapshots(), session.checkpoints
        return await asyncio.to_thread(snapshots.export, model.bundle, session.lease, checkpoints)

    def _snapshots(self) -> SnapshotWriter:
        if self._registry.snapshots is None:
            raise Unsuitable("this server has no snapshot store: start it with --snapshots URI")
        return self._registry.snapshots

    async def _find(self, stream_id: str, caller: Caller) -> tuple[ServedModel, Session]:
        model, session = await find_or_revive(self._registry, stream_id, caller)
        _require_model(caller, model.bundle.name)
        return model, session

    async def _continue(self, request: pb.ContinueRequest, context: Context) -> Attachment:
        caller = admitted(self._callers, context, request)
        for _ in range(_TRIES):
            await self._find(request.stream_id, caller)  # it is held here from now on
            async with self._registry.alone(request.stream_id):
                held = self._registry.held(request.stream_id, caller.name)
                if held is None:
                    continue  # deleted, or moved to another server meanwhile
                model, session = held
                _require_ended(session)
                lease, checkpoint = await off_loop(
                    takes_long(request) or _is_deep(session),
                    continued,
                    model,
                    session,
                    request,
                    compiles=_has_grammar(session, request),
                )
                with suppress(AlreadyClaimed), self._registry.reserving(caller, 1):
                    return await self._opener.open(model, lease, [checkpoint])
        raise _unsteady()

    async def _received(self, requests: AsyncIterator[pb.ImportRequest]) -> bytes:
        models = self._registry.models.values()
        largest = max((model.largest_snapshot for model in models), default=0)
        parts, size, digest = [], 0, b""
        async for request in requests:
            require_within_limits(request)
            size += len(request.part)
            if size > largest:
                raise InvalidRequest(
                    f"part brings the snapshot to {size} bytes; the largest has {largest}",
                    field="part",
                    limit=largest,
                )
            parts.append(request.part)
            digest = request.sha256
        sealed = b"".join(parts)
        if digest != hashlib.sha256(sealed).digest():
            raise InvalidRequest(
                f"sha256 of the last part does not match the {size} bytes received: try again",
                field="sha256",
            )
        return sealed


def session_message(model: ServedModel, session: Session) -> pb.Session:
    """The `Session` message of a session that a model holds."""
    streams = session.streams
    message = pb.Session(
        stream_id=session.lease.stream_id,
        model=model.bundle.name,
        phase=_phase(session),
        outputs=len(streams),
        prompt_tokens=len(streams[0].request.prompt),
        generated_tokens=sum(stream.generated for stream in streams),
        state_bytes=sum(model.held_bytes(stream) for stream in streams),
    )
    if (expires := model.forgets_at(session)) is not None:
        message.expires.FromNanoseconds(int(expires * 1e9))
    return message


def _phase(session: Session) -> pb.SessionPhase:
    if not session.ended:
        return pb.SESSION_PHASE_RUNNING
    paused = any(stream.was_paused for stream in session.streams)
    return pb.SESSION_PHASE_PAUSED if paused else pb.SESSION_PHASE_FINISHED


def _is_deep(session: Session) -> bool:
    """Whether a session has so many tokens that to go through them takes a millisecond."""
    stream = session.streams[0]
    return len(stream.request.prompt) + len(stream.history) > _QUICK_TOKENS


def _has_grammar(session: Session, request: pb.ContinueRequest) -> bool:
    """Whether the stream continues with a grammar: its own, or another one."""
    kept = session.streams[0].request.sampling.grammar is not None
    return request.sampling.HasField("grammar") or (kept and not request.HasField("sampling"))


def _unsteady() -> Displaced:
    return Displaced("other calls change the stream all the time; try again later")


def _require_ended(session: Session) -> None:
    if not session.ended:
        raise Unsuitable("the stream is running: pause it first, or wait for its end")
    if not all(isinstance(stream.ending, Finish) for stream in session.streams):
        raise Unsuitable("the stream failed: only a paused or finished stream can continue")


def _require_model(caller: Caller, model: str) -> None:
    if not caller.may_use(model):
        raise PermissionDenied(f"key {caller.name!r} is not for model {model!r}")
