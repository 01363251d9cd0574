"""Resumes sessions: attaches to those in memory, and revives others from the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

from server.engine.restore import BEGINNING, ResumeCursor
from server.errors import InvalidRequest, StorageFailed, UnknownModel, UnknownSession
from server.ops import metrics
from server.request import Lease
from server.sessions.registry import Attachment, SessionRegistry
from server.sessions.served_model import ServedModel
from server.sessions.table import Session
from server.snapshots.codec import Snapshot, restored

_log = logging.getLogger(__name__)


async def resume(
    registry: SessionRegistry, stream_id: str, owner: str, cursors: Sequence[ResumeCursor]
) -> Attachment:
    """Attach to a stream for a reader who is at `cursors`, one for each output.

    Raises UnknownSession, UnknownModel, SnapshotRefused, StorageFailed, InvalidRequest, Overloaded
    and EngineStopped.
    """
    if (held := registry.held(stream_id, owner)) is None:
        snapshot = await load(registry, stream_id, owner)
        held = registry.held(stream_id, owner)  # another call may have revived it meanwhile
        if held is None:
            return revive(registry, snapshot, cursors)
    model, session = held
    subscribers = await model.attach(session, _padded(cursors, len(session.streams)))
    metrics.RESUMED.labels(model.bundle.name, "memory").inc()
    return Attachment(model, session, subscribers)


async def find_or_revive(
    registry: SessionRegistry, stream_id: str, owner: str
) -> tuple[ServedModel, Session]:
    """A session of this process, revived from the store if no model here holds it.

    A revived session continues to run if it has not ended. Raises what `resume` raises.
    """
    if (held := registry.held(stream_id, owner)) is not None:
        return held
    attachment = await resume(registry, stream_id, owner, ())
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
        except OSError:
            _log.exception("a snapshot could not be read")
            raise StorageFailed("the snapshots cannot be read: try again later") from None
    if snapshot is None:
        raise UnknownSession(
            f"stream {stream_id[:64]!r} is not known: its request did not set keep, or it is no "
            "longer kept"
        )
    return snapshot


def revive(
    registry: SessionRegistry,
    snapshot: Snapshot,
    cursors: Sequence[ResumeCursor] = (),
    stream_id: str = "",
) -> Attachment:
    """Open a session from a snapshot, with a new name if `stream_id` is given.

    Raises what `resume` raises.
    """
    model = model_of(registry, snapshot)
    lease, checkpoints = restored(model.bundle, snapshot)
    lease = replace(lease, stream_id=stream_id or lease.stream_id)
    cursors = _padded(cursors, len(lease.requests))
    _require_tokens(model, cursors)
    session = model.open(_buffered(model, lease), checkpoints, cursors)
    metrics.RESUMED.labels(model.bundle.name, "store").inc()
    return Attachment(model, session, session.subscribers)


def model_of(registry: SessionRegistry, snapshot: Snapshot) -> ServedModel:
    """The model of a snapshot's stream. Raises UnknownModel."""
    model = registry.models.get(snapshot.model)
    if model is None:
        raise UnknownModel(f"the stream is of model {snapshot.model!r}, which is not served here")
    return model


def _buffered(model: ServedModel, lease: Lease) -> Lease:
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
