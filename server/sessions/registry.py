"""Finds sessions by name, in the models of this process and in the store."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from server.errors import EngineStopped, StorageFailed
from server.sessions.served_model import ServedModel
from server.sessions.subscriber import Subscriber
from server.sessions.table import Session
from server.snapshots.writer import SnapshotWriter

_log = logging.getLogger(__name__)
NAME_BYTES = 16
_FLUSH_S = 30.0


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

    @property
    def holders(self) -> list[ServedModel]:
        """All models that can hold sessions."""
        return [*self.models.values(), *self._draining]

    def running(self, owner: str) -> int:
        """Number of streams of an owner that wait or run in this process."""
        return sum(model.table.running(owner) for model in self.holders)

    def is_durable(self, session: Session) -> bool:
        """Whether the session outlives this process."""
        return self.snapshots is not None and self.snapshots.is_durable and session.lease.keep_s > 0

    def held(self, stream_id: str, owner: str) -> tuple[ServedModel, Session] | None:
        """The owner's session and its model; None if no model of this process holds it."""
        for model in self.holders:
            if (session := model.find(stream_id, owner)) is not None:
                return model, session
        return None

    async def stored(self, owner: str) -> list[str]:
        """Names of the owner's streams in the store, in order. Raises StorageFailed."""
        if self.snapshots is None:
            return []
        try:
            return await asyncio.to_thread(self.snapshots.streams, owner)
        except OSError:
            _log.exception("the store cannot be listed")
            raise StorageFailed("the snapshots cannot be listed: try again later") from None

    def store(self, model: ServedModel, session: Session) -> None:
        """Have a session that does not run written to the store later."""
        if self.snapshots is not None and session.lease.keep_s:
            for output, checkpoint in enumerate(session.checkpoints):
                self.snapshots.offer(model.bundle, session.lease, output, checkpoint)

    async def delete(self, stream_id: str, owner: str) -> None:
        """End a stream and delete it, in memory and in the store.

        Does nothing if it does not exist. Raises StorageFailed, EngineStopped.
        """
        if (held := self.held(stream_id, owner)) is not None:
            model, session = held
            await model.forget(session)
        if self.snapshots is not None:
            try:
                await asyncio.to_thread(self.snapshots.forget, owner, stream_id)
            except FileNotFoundError:
                pass
            except OSError:
                _log.exception("a stream could not be deleted")
                raise StorageFailed("the snapshots cannot be deleted: try again later") from None


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
    await asyncio.to_thread(snapshots.flush, _FLUSH_S)
