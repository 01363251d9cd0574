"""Resumes sessions: attaches to those in memory, and revives others from the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

from server.auth.api_keys import Caller
from server.checkpoint import Checkpoint
from server.engine.restore import BEGINNING, ResumeCursor
from server.errors import (
    Displaced,
    InvalidRequest,
    StorageFailed,
    UnknownModel,
    UnknownSession,
)
from server.ops import metrics
from server.request import Lease
from server.sessions.registry import Attachment, SessionRegistry
from server.sessions.served_model import ServedModel
from server.sessions.table import Session
from server.snapshots.claims import AlreadyClaimed
from server.snapshots.codec import Snapshot, restored
from server.snapshots.names import Claim

_log = logging.getLogger(__name__)
_TRIES = 3  # another call may change the session between its look-up and the attachment


async def resume(
    registry: SessionRegistry,
    stream_id: str,
    caller: Caller,
    cursors: Sequence[ResumeCursor],
    joins: bool = False,
) -> Attachment:
    """Attach to a stream for a reader who is at `cursors`, one for each output.

    joins: readers that are attached stay; else this one takes their place.

    Raises UnknownSession, UnknownModel, SnapshotRefused, StorageFailed, InvalidRequest, Overloaded,
    QuotaExceeded and EngineStopped.
    """
    for _ in range(_TRIES):
        held = registry.held(stream_id, caller.name)
        if held is not None and not held[1].lease.keep_s:
            raise _unknown(stream_id)  # what it has sent is not there any more
        try:
            if held is None:
                return await _take_over(registry, stream_id, caller, cursors)
            model, session = held
            if not await registry.owned(model, session):
                continue  # another server owns it; this one takes it back
            subscribers = await model.attach(session, _padded(cursors, len(session.streams)), joins)
        except AlreadyClaimed:
            continue  # another server was faster
        except UnknownSession:
            if held is None:
                raise
            continue  # deleted, expired or continued since it was found
        metrics.RESUMED.labels(model.bundle.name, "memory").inc()
        return Attachment(model, session, subscribers)
    raise Displaced("other calls change the stream all the time; try again later")


async def find_or_revive(
    registry: SessionRegistry, stream_id: str, caller: Caller
) -> tuple[ServedModel, Session]:
    """A session of this process, revived from the store if no model here holds it.

    A revived session continues to run if it has not ended. Raises what `resume` raises.
    """
    held = registry.held(stream_id, caller.name)
    if held is not None and await registry.owned(*held):
        return held
    attachment = await resume(registry, stream_id, caller, (), joins=True)
    attachment.leave()
    return attachment.model, attachment.session


async def load(registry: SessionRegistry, stream_id: str, owner: str) -> Snapshot:
    """The snapshot of a stream in the store.

    Raises UnknownSession, SnapshotRefused, StorageFailed.
    """
    snapshot = None
    if registry.snapshots is not None:
        try:
            snapshot = await asyncio.to_thread(registry.snapshots.load, owner, stream_id)
        except OSError as error:
            _log.error("a snapshot could not be read: %s", error)
            raise StorageFailed("the snapshots cannot be read: try again later") from None
    if snapshot is None:
        raise _unknown(stream_id)
    return snapshot


async def _take_over(
    registry: SessionRegistry, stream_id: str, caller: Caller, cursors: Sequence[ResumeCursor]
) -> Attachment:
    """Claim a stream that the store has, in the next epoch, and open it here: all or nothing.

    Raises what `resume` raises, and AlreadyClaimed.
    """
    async with registry.alone(stream_id):
        if (held := registry.held(stream_id, caller.name)) is not None:
            raise AlreadyClaimed(Claim(held[1].lease.epoch))  # by another call to this server
        snapshot = await load(registry, stream_id, caller.name)
        model = model_of(registry, snapshot)
        lease, checkpoints = await asyncio.to_thread(restored, model.bundle, snapshot)
        lease = replace(buffered(model, lease), epoch=snapshot.epoch + 1)
        cursors = _padded(cursors, len(lease.requests))
        _require_tokens(model, cursors)
        with registry.reserving(caller, sum(each.finish is None for each in checkpoints)):
            session = model.reserve(lease, checkpoints, cursors)
            try:
                await _claim(registry, model, lease, checkpoints)
                session.stored = True
                model.commit(session)
            except BaseException:
                model.release(session)
                raise
    metrics.RESUMED.labels(model.bundle.name, "store").inc()
    return Attachment(model, session, session.subscribers)


async def _claim(
    registry: SessionRegistry,
    model: ServedModel,
    lease: Lease,
    checkpoints: Sequence[Checkpoint],
) -> None:
    assert registry.snapshots is not None  # the snapshot is from there
    try:
        await asyncio.to_thread(registry.snapshots.begin, model.bundle, lease, checkpoints)
    except OSError as error:
        raise StorageFailed("the stream cannot be taken over: try again later") from error


def _unknown(stream_id: str) -> UnknownSession:
    return UnknownSession(
        f"stream {stream_id[:64]!r} is not known: its request did not set keep, or it is no longer "
        "kept"
    )


def model_of(registry: SessionRegistry, snapshot: Snapshot) -> ServedModel:
    """The model of a snapshot's stream. Raises UnknownModel."""
    model = registry.models.get(snapshot.model)
    if model is None:
        raise UnknownModel(f"the stream is of model {snapshot.model!r}, which is not served here")
    return model


def buffered(model: ServedModel, lease: Lease) -> Lease:
    """The lease with a `stream_interval` no larger than this server's stream buffer."""
    most = model.config.stream_buffer
    requests = (replace(r, stream_interval=min(r.stream_interval, most)) for r in lease.requests)
    return replace(lease, requests=tuple(requests))


def _padded(cursors: Sequence[ResumeCursor], outputs: int) -> list[ResumeCursor]:
    """One cursor for each output. Raises InvalidRequest if there are more cursors than outputs."""
    if len(cursors) > outputs:
        raise InvalidRequest(
            f"cursors names output {len(cursors) - 1}, the stream has outputs 0 to {outputs - 1}"
        )
    return [*cursors, *[BEGINNING] * (outputs - len(cursors))]


def _require_tokens(model: ServedModel, cursors: Sequence[ResumeCursor]) -> None:
    """Raise InvalidRequest if a cursor has a token id that is not in the model's vocabulary."""
    vocabulary = model.bundle.vocabulary
    highest = max((max(cursor.last_ids, default=0) for cursor in cursors), default=0)
    if highest >= vocabulary:
        raise InvalidRequest(
            f"cursors.last_ids has {highest}; ids of {model.bundle.name} must be below {vocabulary}"
        )
