"""Sessions that go on: attached where they are, or brought back from the store."""

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


async def follow(
    registry: SessionRegistry, stream_id: str, owner: str, cursors: Sequence[ResumeCursor]
) -> Attachment:
    """The rest of a stream, for a reader who is at `cursors` of its outputs.

    Raises UnknownSession, SnapshotRefused, InvalidRequest, Overloaded, EngineStopped.
    """
    if (held := registry.held(stream_id, owner)) is None:
        snapshot = await load(registry, stream_id, owner)
        held = registry.held(stream_id, owner)  # somebody may have been faster
        if held is None:
            return revive(registry, snapshot, cursors)
    model, session = held
    subscribers = await model.attach(session, _padded(cursors, len(session.streams)))
    metrics.RESUMED.labels(model.bundle.name, "memory").inc()
    return Attachment(model, session, subscribers)


async def at_rest(
    registry: SessionRegistry, stream_id: str, owner: str
) -> tuple[ServedModel, Session]:
    """A session, brought here from the store if no model of this process has it.

    One that was running elsewhere goes on here. Raises as `follow` does.
    """
    if (held := registry.held(stream_id, owner)) is not None:
        return held
    attachment = await follow(registry, stream_id, owner, ())
    attachment.leave()
    return attachment.model, attachment.session


async def load(registry: SessionRegistry, stream_id: str, owner: str) -> Snapshot:
    """What the store has of a stream. Raises UnknownSession, SnapshotRefused, StorageFailed."""
    snapshot = None
    if registry.snapshots is not None:
        try:
            snapshot = await asyncio.to_thread(registry.snapshots.load, owner, stream_id)
        except OSError:
            _log.exception("a snapshot could not be read")
            raise StorageFailed("the snapshots cannot be read: try again later") from None
    if snapshot is None:
        raise UnknownSession(
            f"stream {stream_id[:64]!r} is not known: it was never asked to be kept, or it is "
            "over and was kept long enough"
        )
    return snapshot


def revive(
    registry: SessionRegistry,
    snapshot: Snapshot,
    cursors: Sequence[ResumeCursor] = (),
    stream_id: str = "",
) -> Attachment:
    """A session made of a snapshot, under another name if one is given. Raises as `follow` does."""
    model = model_of(registry, snapshot)
    lease, checkpoints = restored(model.bundle, snapshot)
    lease = replace(lease, stream_id=stream_id or lease.stream_id)
    cursors = _padded(cursors, len(lease.requests))
    _require_tokens(model, cursors)
    session = model.open(_buffered(model, lease), checkpoints, cursors)
    metrics.RESUMED.labels(model.bundle.name, "store").inc()
    return Attachment(model, session, session.subscribers)


def model_of(registry: SessionRegistry, snapshot: Snapshot) -> ServedModel:
    """The model that goes on with a stream. Raises UnknownModel."""
    model = registry.models.get(snapshot.model)
    if model is None:
        raise UnknownModel(f"the stream is of model {snapshot.model!r}, not served here")
    return model


def _buffered(model: ServedModel, lease: Lease) -> Lease:
    """The lease with events no larger than what this server buffers of a stream."""
    most = model.config.stream_buffer
    requests = (replace(r, stream_interval=min(r.stream_interval, most)) for r in lease.requests)
    return replace(lease, requests=tuple(requests))


def _padded(cursors: Sequence[ResumeCursor], outputs: int) -> list[ResumeCursor]:
    """A cursor for every output. Raises InvalidRequest where there are too many."""
    if len(cursors) > outputs:
        raise InvalidRequest(
            f"cursors names output {len(cursors) - 1}, the stream has outputs 0 to {outputs - 1}"
        )
    return [*cursors, *[BEGINNING] * (outputs - len(cursors))]


def _require_tokens(model: ServedModel, cursors: Sequence[ResumeCursor]) -> None:
    """That the tokens a reader knows, which are pushed again, are tokens of the model."""
    vocabulary = model.bundle.vocabulary
    highest = max((max(cursor.last_ids, default=0) for cursor in cursors), default=0)
    if highest >= vocabulary:
        raise InvalidRequest(
            f"cursors.last_ids has {highest}; ids of {model.bundle.name} must be below {vocabulary}"
        )
