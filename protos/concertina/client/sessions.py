"""Sessions: streams that the server keeps. Pause, continue, copy, export, import, delete them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Unpack

import grpc

from concertina.client.connection import AsyncConnection, Connection, Stubs
from concertina.client.errors import ContractViolation, InvalidRequest
from concertina.client.fields import message
from concertina.client.parameters import ContinueParameters
from concertina.client.requests import continue_request, fork_request
from concertina.client.resuming import DEFAULT_KEEP_S, Resumption
from concertina.client.statuses import session_error, told_by
from concertina.client.streams import AsyncStream, Stream
from concertina.v1 import session_service_pb2 as pb

PART_BYTES = 1024 * 1024
PAGE_SIZE = 1000


class SessionPhase(StrEnum):
    """What a session is doing."""

    RUNNING = "running"  # its stream waits or runs
    PAUSED = "paused"  # it was paused, forked or imported
    FINISHED = "finished"
    STORED = "stored"  # it is in the store; another replica may know more
    UNKNOWN = "unknown"  # a phase that only newer clients know


@dataclass(frozen=True, slots=True)
class Session:
    """A stream and its state.

    generated_tokens, state_bytes: over all outputs. expires: when the server forgets it; None while
    somebody reads it. If it is STORED, only its name is known.
    """

    stream_id: str
    model: str
    phase: SessionPhase
    outputs: int
    prompt_tokens: int
    generated_tokens: int
    state_bytes: int
    expires: datetime | None


class Sessions:
    """The sessions of a server, for blocking code: `client.sessions`.

    Every method raises ConcertinaError: SessionNotFound for an unknown name, SessionUnsuitable for
    a session whose state does not allow the call. timeout: seconds after which a call is given up.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = connection.sessions

    def pause(self, stream_id: str, *, timeout: float | None = None) -> Session:
        """Stops a stream and keeps its state; its reader gets Finished with PAUSED."""
        request = message(pb.PauseRequest, stream_id=stream_id)
        return _session(self._answer(self._stub.Pause, request, timeout).session)

    def continue_(
        self,
        stream_id: str,
        prompt: str | Sequence[int] | None = None,
        *,
        timeout: float | None = None,
        resume_for: float = DEFAULT_KEEP_S,
        **parameters: Unpack[ContinueParameters],
    ) -> Stream:
        """Continues a paused or finished stream, after a `prompt` if one is given.

        The stream keeps its name. If it is cancelled before its end, it is paused, not forgotten.
        parameters: see ContinueParameters. If any of the sampling parameters is given, the others
        have their defaults, except for the seed. The same holds for those that say when to stop.
        """
        request = continue_request(stream_id, prompt, parameters)
        resumption = _resumption(self._connection, request, timeout, resume_for)
        return Stream(self._connection, resumption)

    def fork(self, stream_id: str, n: int = 1, *, timeout: float | None = None) -> list[str]:
        """Makes `n` paused copies, each with its own seed, and returns their names."""
        request = fork_request(stream_id, n)
        return [*self._answer(self._stub.Fork, request, timeout).stream_ids]

    def export(self, stream_id: str, *, timeout: float | None = None) -> bytes:
        """The snapshot of a session, sealed: only a server with the same key can open it."""
        snapshot = _Snapshot(self._connection.address)
        try:
            for part in self._stub.Export(
                message(pb.ExportRequest, stream_id=stream_id), timeout=timeout
            ):
                snapshot.add(part)
        except grpc.RpcError as error:
            raise _error(self._connection, error) from None
        return snapshot.whole()

    def import_(self, snapshot: bytes, *, timeout: float | None = None) -> Session:
        """Makes a session, with a new name, from an exported snapshot."""
        return _session(self._answer(self._stub.Import, _parts(snapshot), timeout).session)

    def delete(self, stream_id: str, *, timeout: float | None = None) -> None:
        """Ends a stream if it runs, and forgets it. An unknown name is no error."""
        self._answer(self._stub.Delete, message(pb.DeleteRequest, stream_id=stream_id), timeout)

    def list(self, *, timeout: float | None = None) -> tuple[Session, ...]:
        """The caller's sessions in the replica that answers and in the store, by name."""
        request, found = pb.ListSessionsRequest(page_size=PAGE_SIZE), []
        while True:
            page = self._answer(self._stub.ListSessions, request, timeout)
            found += [_session(session) for session in page.sessions]
            if not page.next_page_token:
                return tuple(found)
            request.page_token = page.next_page_token

    def _answer(self, method: Any, request: Any, timeout: float | None) -> Any:
        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise _error(self._connection, error) from None


class AsyncSessions:
    """The sessions of a server, for asyncio code: what Sessions does."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._stub = connection.sessions

    async def pause(self, stream_id: str, *, timeout: float | None = None) -> Session:
        """Stops a stream and keeps its state; its reader gets Finished with PAUSED."""
        request = message(pb.PauseRequest, stream_id=stream_id)
        return _session((await self._answer(self._stub.Pause, request, timeout)).session)

    def continue_(
        self,
        stream_id: str,
        prompt: str | Sequence[int] | None = None,
        *,
        timeout: float | None = None,
        resume_for: float = DEFAULT_KEEP_S,
        **parameters: Unpack[ContinueParameters],
    ) -> AsyncStream:
        """Continues a paused or finished stream, as Sessions.continue_ does."""
        request = continue_request(stream_id, prompt, parameters)
        resumption = _resumption(self._connection, request, timeout, resume_for)
        return AsyncStream(self._connection, resumption)

    async def fork(self, stream_id: str, n: int = 1, *, timeout: float | None = None) -> list[str]:
        """Makes `n` paused copies, each with its own seed, and returns their names."""
        request = fork_request(stream_id, n)
        return [*(await self._answer(self._stub.Fork, request, timeout)).stream_ids]

    async def export(self, stream_id: str, *, timeout: float | None = None) -> bytes:
        """The snapshot of a session, sealed: only a server with the same key can open it."""
        snapshot = _Snapshot(self._connection.address)
        request = message(pb.ExportRequest, stream_id=stream_id)
        try:
            async for part in self._stub.Export(request, timeout=timeout):
                snapshot.add(part)
        except grpc.aio.AioRpcError as error:
            raise _error(self._connection, error) from None
        return snapshot.whole()

    async def import_(self, snapshot: bytes, *, timeout: float | None = None) -> Session:
        """Makes a session, with a new name, from an exported snapshot."""
        response = await self._answer(self._stub.Import, _parts(snapshot), timeout)
        return _session(response.session)

    async def delete(self, stream_id: str, *, timeout: float | None = None) -> None:
        """Ends a stream if it runs, and forgets it. An unknown name is no error."""
        await self._answer(
            self._stub.Delete, message(pb.DeleteRequest, stream_id=stream_id), timeout
        )

    async def list(self, *, timeout: float | None = None) -> tuple[Session, ...]:
        """The caller's sessions in the replica that answers and in the store, by name."""
        request, found = pb.ListSessionsRequest(page_size=PAGE_SIZE), []
        while True:
            page = await self._answer(self._stub.ListSessions, request, timeout)
            found += [_session(session) for session in page.sessions]
            if not page.next_page_token:
                return tuple(found)
            request.page_token = page.next_page_token

    async def _answer(self, method: Any, request: Any, timeout: float | None) -> Any:
        try:
            return await method(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise _error(self._connection, error) from None


class _Snapshot:
    """Joins the parts of a snapshot. address: of the server, named in errors."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._parts: list[bytes] = []
        self._sha256 = b""

    def add(self, response: pb.ExportResponse) -> None:
        self._parts.append(response.part)
        self._sha256 = response.sha256

    def whole(self) -> bytes:
        """The joined parts. Raises ContractViolation if one is missing or damaged."""
        whole = b"".join(self._parts)
        if hashlib.sha256(whole).digest() != self._sha256:
            raise ContractViolation(
                f"the snapshot from {self._address} was cut or damaged: {len(whole)} bytes "
                "arrived, and their checksum is not the one sent with them; export it again"
            )
        return whole


def _parts(snapshot: bytes) -> Iterator[pb.ImportRequest]:
    """The requests that send a snapshot. Raises InvalidRequest for what is none."""
    if not isinstance(snapshot, bytes | bytearray | memoryview):
        what = f"snapshot is of type {type(snapshot).__name__}: give the bytes of `export`"
        raise InvalidRequest(what, field="part")
    return _requests(bytes(snapshot))


def _requests(snapshot: bytes) -> Iterator[pb.ImportRequest]:
    digest = hashlib.sha256(snapshot).digest()
    for at in range(0, len(snapshot) or 1, PART_BYTES):
        last = at + PART_BYTES >= len(snapshot)
        part = snapshot[at : at + PART_BYTES]
        yield pb.ImportRequest(part=part, sha256=digest if last else b"")


def _resumption(
    stubs: Stubs, request: pb.ContinueRequest, timeout: float | None, resume_for: float
) -> Resumption:
    return Resumption(stubs.address, request, timeout=timeout, resume_for=resume_for, forget=False)


def _error(stubs: Stubs, error: grpc.RpcError) -> Exception:
    told = told_by(error.trailing_metadata())
    return session_error(stubs.address, error.code(), error.details() or "", told)


_PHASES = {
    pb.SESSION_PHASE_RUNNING: SessionPhase.RUNNING,
    pb.SESSION_PHASE_PAUSED: SessionPhase.PAUSED,
    pb.SESSION_PHASE_FINISHED: SessionPhase.FINISHED,
    pb.SESSION_PHASE_STORED: SessionPhase.STORED,
}


def _session(session: pb.Session) -> Session:
    expires = session.expires.ToDatetime(UTC) if session.HasField("expires") else None
    return Session(
        stream_id=session.stream_id,
        model=session.model,
        phase=_PHASES.get(session.phase, SessionPhase.UNKNOWN),
        outputs=session.outputs,
        prompt_tokens=session.prompt_tokens,
        generated_tokens=session.generated_tokens,
        state_bytes=session.state_bytes,
        expires=expires,
    )
