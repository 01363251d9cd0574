"""Sessions by name, wherever they are: in a model of this process, or in the store."""

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
    """A session, and those who read it from here on."""

    model: ServedModel
    session: Session
    subscribers: tuple[Subscriber, ...]

    def leave(self) -> None:
        """They read no more."""
        self.model.leave(self.session, self.subscribers)


class SessionRegistry:
    """Finds, lists and deletes the sessions of a process.

    New streams go to `models`; those that are `draining` finish what they began. Both change.
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
        """All models that may hold sessions."""
        return [*self.models.values(), *self._draining]

    def running(self, owner: str) -> int:
        """Streams of an owner that wait or run in this process."""
        return sum(
            not stream.ended
            for model in self.holders
            for session in model.sessions(owner)
            for stream in session.streams
        )

    def is_durable(self, session: Session) -> bool:
        """Whether it survives this process."""
        return self.snapshots is not None and self.snapshots.is_durable and session.lease.keep_s > 0

    def held(self, stream_id: str, owner: str) -> tuple[ServedModel, Session] | None:
        """The session, if a model of this process has it."""
        for model in self.holders:
            if (session := model.find(stream_id, owner)) is not None:
                return model, session
        return None

    async def stored(self, owner: str) -> list[str]:
        """Names of the owner's streams in the store. Raises StorageFailed."""
        if self.snapshots is None:
            return []
        try:
            return await asyncio.to_thread(self.snapshots.streams, owner)
        except OSError:
            _log.exception("the store cannot be listed")
            raise StorageFailed("the snapshots cannot be listed: try again later") from None

    def store(self, model: ServedModel, session: Session) -> None:
        """Have a session written that rests."""
        if self.snapshots is not None and session.lease.keep_s:
            for output, checkpoint in enumerate(session.checkpoints):
                self.snapshots.offer(model.bundle, session.lease, output, checkpoint)

    async def delete(self, stream_id: str, owner: str) -> None:
        """End a stream, if it is there, and forget it. Raises StorageFailed, EngineStopped."""
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
    """A name that nobody can guess."""
    return secrets.token_hex(NAME_BYTES)


async def hand_over(models: Iterable[ServedModel], snapshots: SnapshotWriter | None) -> None:
    """Have everything stored that can go on elsewhere, and send its readers there."""
    if snapshots is None or not snapshots.is_durable:
        return
    for model in models:
        with suppress(EngineStopped):
            await model.hand_over()
    if left := await asyncio.to_thread(snapshots.flush, _FLUSH_S):
        _log.error("%d snapshots could not be saved", left)
