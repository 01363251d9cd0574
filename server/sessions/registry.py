"""Finds sessions by name, in the models of this process and in the store."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from server.auth.api_keys import Caller
from server.auth.quota import require_room
from server.errors import EngineStopped, StorageFailed
from server.request import Lease
from server.sessions.served_model import ServedModel
from server.sessions.subscriber import Subscriber
from server.sessions.table import Session
from server.snapshots.writer import SnapshotWriter

_log = logging.getLogger(__name__)
NAME_BYTES = 16
_FLUSH_S = 30.0
_OPENING_S = 1.0  # streams that are still being opened may fail soon


@dataclass(frozen=True)
class Attachment:
    """A session and its subscribers, one for each output."""

    model: ServedModel
    session: Session
    subscribers: tuple[Subscriber, ...]

    def leave(self) -> None:
        """Detach the subscribers: the session is kept, or its streams end."""
        self.model.leave(self.session, self.subscribers)


class SessionRegistry:
    """Finds, lists and deletes the sessions of a process.

    models: by name; they open new sessions. draining: models that only finish their sessions. Both
    collections change while the process runs.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        snapshots: SnapshotWriter | None = None,
        draining: Collection[ServedModel] = (),
    ) -> None:
        self.models = models
        self.snapshots = snapshots
        self._draining = draining
        self._reserved: Counter[str] = Counter()  # streams of an owner that are being opened
        if snapshots is not None:
            snapshots.on_stored, snapshots.on_lost = self._stored_now, self._lost
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}  # with the number of their users

    @property
    def holders(self) -> list[ServedModel]:
        """All models that can hold sessions."""
        return [*self.models.values(), *self._draining]

    @contextmanager
    def reserving(self, caller: Caller, streams: int) -> Iterator[None]:
        """Hold `streams` of a caller's quota while they are opened.

        Raises QuotaExceeded, and InvalidRequest if they are more than the quota.
        """
        require_room(caller, self.running, streams, partial(self._room_after_s, caller.name))
        self._reserved[caller.name] += streams
        try:
            yield
        finally:
            self._reserved[caller.name] -= streams

    @asynccontextmanager
    async def alone(self, stream_id: str) -> AsyncIterator[None]:
        """Let no other call open, continue or delete the stream of this name meanwhile."""
        lock, users = self._locks.get(stream_id, (asyncio.Lock(), 0))
        self._locks[stream_id] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks.pop(stream_id)
            if users > 1:
                self._locks[stream_id] = lock, users - 1

    def running(self, owner: str) -> int:
        """Number of an owner's streams in this process that wait, run, or are being opened."""
        return self._reserved[owner] + sum(model.table.running(owner) for model in self.holders)

    def _room_after_s(self, owner: str, ends: int) -> float:
        """Estimated seconds until so many of an owner's streams have ended."""
        estimates = [model.room_after_s(owner, ends) for model in self.holders]
        return min((each for each in estimates if each is not None), default=_OPENING_S)

    def is_durable(self, session: Session) -> bool:
        """Whether a session is in a store that outlives this process."""
        return self.snapshots is not None and self.snapshots.is_durable and session.stored

    def held(self, stream_id: str, owner: str) -> tuple[ServedModel, Session] | None:
        """The owner's session and its model; None if no model of this process holds it."""
        for model in self.holders:
            if (session := model.find(stream_id, owner)) is not None:
                return model, session
        return None

    async def owned(self, model: ServedModel, session: Session) -> bool:
        """Whether this process still owns a session that it holds; if not, it lets go of it.

        While the store is away, nobody else can own it. Raises EngineStopped.
        """
        if self.snapshots is None or not session.stored:
            return True
        lease = session.lease
        try:
            claim = await asyncio.to_thread(
                self.snapshots.newest_epoch, lease.owner, lease.stream_id
            )
        except OSError:
            return True
        if claim is None or not claim.is_above(lease.epoch):
            return True
        await model.lose(session, claim.deleted)
        return False

    def _stored_now(self, lease: Lease, stored: bool) -> None:
        """The writer has stored a stream that began while the store was away, or one expired."""
        held = self.held(lease.stream_id, lease.owner)
        if held is not None and held[1].lease.epoch == lease.epoch:
            held[1].stored = stored

    def _lost(self, lease: Lease, deleted: bool) -> None:
        """The writer found that another server owns a stream, or has deleted it."""
        held = self.held(lease.stream_id, lease.owner)
        if held is not None and held[1].lease.epoch == lease.epoch:
            model, session = held
            model.lose_soon(session, deleted)

    async def stored(self, owner: str) -> list[str]:
        """Names of the owner's streams in the store, in order. Raises StorageFailed."""
        if self.snapshots is None:
            return []
        try:
            return await asyncio.to_thread(self.snapshots.streams, owner)
        except OSError as error:
            _log.error("the store cannot be listed: %s", error)
            raise StorageFailed("the snapshots cannot be listed: try again later") from None

    async def delete(self, stream_id: str, owner: str) -> None:
        """End a stream and delete its session, in memory and in the store.

        Does nothing if there is no such stream. Raises StorageFailed and EngineStopped.
        """
        async with self.alone(stream_id):
            if (held := self.held(stream_id, owner)) is not None:
                model, session = held
                await model.forget(session)
            if self.snapshots is not None:
                try:
                    await asyncio.to_thread(self.snapshots.forget, owner, stream_id)
                except FileNotFoundError:
                    pass
                except OSError as error:
                    _log.error("a stream could not be deleted: %s", error)
                    message = "the snapshots cannot be deleted: try again later"
                    raise StorageFailed(message) from None


def new_name() -> str:
    """A random stream name, which cannot be guessed."""
    return secrets.token_hex(NAME_BYTES)


async def hand_over(models: Iterable[ServedModel], snapshots: SnapshotWriter | None) -> None:
    """Store all durable sessions and end their streams with HandedOver.

    Does nothing without a store that outlives this process.
    """
    if snapshots is None or not snapshots.is_durable:
        return
    for model in models:
        with suppress(EngineStopped):
            await model.hand_over()
    if left := await asyncio.to_thread(snapshots.flush, _FLUSH_S):
        _log.error("%d snapshots could not be saved", left)
