"""Opens sessions: for new and repeated requests, and for continued, copied and imported streams."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from server.auth.api_keys import Caller
from server.checkpoint import Checkpoint
from server.errors import InvalidRequest, RequestError, StorageFailed, UnknownSession
from server.request import Lease, Request
from server.sessions.registry import NAME_BYTES, Attachment, SessionRegistry, new_name
from server.sessions.reviver import buffered, load, model_of, resume
from server.sessions.served_model import ServedModel
from server.sessions.table import Session
from server.snapshots.claims import AlreadyClaimed
from server.snapshots.codec import Snapshot, restored

_log = logging.getLogger(__name__)


class SessionOpener:
    """Opens sessions on the models of a `registry`, and stores those with `keep` first."""

    def __init__(self, registry: SessionRegistry) -> None:
        self._registry = registry
        snapshots = registry.snapshots
        self._secret = snapshots.secret if snapshots else secrets.token_bytes(32)

    async def start(
        self,
        model: ServedModel,
        requests: tuple[Request, ...],
        caller: Caller,
        keep_s: float = 0.0,
        idempotency_key: str = "",
        draws_seed: bool = False,
    ) -> Attachment:
        """Start a stream, or attach to the one that an earlier request with the same key started.

        draws_seed: the caller gave no seed, so a request with another seed counts as the same; with
        a key, the seed follows from it. Raises RequestError.
        """
        owner = caller.name
        if not idempotency_key:
            lease = Lease(new_name(), requests, owner, keep_s, time.time())
            with self._registry.reserving(caller, len(requests)):
                return await self.open(model, lease)
        stream_id = self._name(owner, idempotency_key)
        if draws_seed:
            requests = _with_seed(requests, self._seed(stream_id))
        lease = Lease(stream_id, requests, owner, keep_s, time.time())
        async with self._registry.alone(stream_id):
            try:
                first = await self._first(stream_id, owner)
            except StorageFailed:
                # If another server has the stream, this shows when it is stored here; until then
                # both generate the same.
                first = None
            if first is None:
                with suppress(AlreadyClaimed), self._registry.reserving(caller, len(requests)):
                    return await self.open(model, lease)
                # Another server has opened it meanwhile, for the same key.
                first = await self._first(stream_id, owner)
        if first is None:
            # A copy of the request that comes late must not bring back what a Delete has ended.
            raise InvalidRequest(
                "idempotency_key is of a stream that was deleted: use a new key for a new stream"
            )
        _require_same(*first, model.bundle.name, lease, draws_seed)
        return await resume(self._registry, stream_id, caller, (), joins=True)

    async def open(
        self, model: ServedModel, lease: Lease, checkpoints: Sequence[Checkpoint] = ()
    ) -> Attachment:
        """Open a session, which continues from `checkpoints` if given; all of it or nothing.

        A session with `keep` is in the store when this returns, unless it is new and the store is
        away. Raises what `ServedModel.open` raises, StorageFailed, and AlreadyClaimed if another
        server owns the stream.
        """
        session = model.reserve(lease, checkpoints)
        try:
            session.stored = await self._store(model, lease, checkpoints)
            model.commit(session)
        except BaseException:
            model.release(session)
            if self._registry.snapshots is not None:
                self._registry.snapshots.begin_never(lease)
            raise
        return Attachment(model, session, session.subscribers)

    async def adopt(self, snapshot: Snapshot, caller: Caller) -> tuple[ServedModel, Session]:
        """Open a session from an imported snapshot, with a new name.

        Raises what `resume` raises, and StorageFailed.
        """
        model = model_of(self._registry, snapshot)
        lease, checkpoints = await asyncio.to_thread(restored, model.bundle, snapshot)
        lease = _renamed(buffered(model, lease))
        with self._registry.reserving(caller, len(checkpoints)):
            attachment = await self.open(model, lease, [_anew(each) for each in checkpoints])
        attachment.leave()
        return attachment.model, attachment.session

    async def copy(
        self, model: ServedModel, session: Session, caller: Caller, copies: int
    ) -> list[str]:
        """Copy a session that has ended, with other seeds: all copies or none. Their names.

        Raises what `open` raises, and QuotaExceeded.
        """
        made: list[str] = []
        checkpoints = [_anew(each) for each in session.checkpoints]
        with self._registry.reserving(caller, copies):
            try:
                for _ in range(copies):
                    lease = _reseeded(session.lease)
                    made.append(lease.stream_id)
                    (await self.open(model, lease, checkpoints)).leave()
                    await asyncio.sleep(0)  # other calls have their turn between two copies
            except BaseException:
                for stream_id in made:
                    with suppress(RequestError):
                        await self._registry.delete(stream_id, caller.name)
                raise
        return made

    async def _store(
        self, model: ServedModel, lease: Lease, checkpoints: Sequence[Checkpoint]
    ) -> bool:
        """Write the beginning of a session with `keep`; whether it is in the store."""
        snapshots = self._registry.snapshots
        if snapshots is None or not lease.keep_s:
            return False
        try:
            await asyncio.to_thread(snapshots.begin, model.bundle, lease, checkpoints)
        except OSError as error:
            if checkpoints:
                raise StorageFailed(
                    "the stream cannot be stored, so it stays as it was: try again later"
                ) from error
            _log.error("a new stream is not stored yet: %s", error)
            snapshots.begin_later(model.bundle, lease)
            return False
        return True

    async def _first(self, stream_id: str, owner: str) -> tuple[str, Lease] | None:
        """Model and lease of the first request for this stream; None if there is no such stream.

        Raises StorageFailed, and what `restored` raises.
        """
        if (held := self._registry.held(stream_id, owner)) is not None:
            model, session = held
            return model.bundle.name, session.lease
        if self._registry.snapshots is not None and not self._registry.snapshots.is_up:
            raise StorageFailed("the snapshots cannot be read: try again later")
        try:
            snapshot = await load(self._registry, stream_id, owner)
        except UnknownSession:
            return None
        bundle = model_of(self._registry, snapshot).bundle
        lease, _ = await asyncio.to_thread(restored, bundle, snapshot)
        return snapshot.model, lease

    def _name(self, owner: str, key: str) -> str:
        """The stream name for an idempotency key. It cannot be guessed without the secret."""
        text = f"{len(owner)}:{owner}{key}".encode()
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()[: 2 * NAME_BYTES]

    def _seed(self, stream_id: str) -> int:
        """A seed that is the same on all servers. It cannot be guessed without the secret."""
        digest = hmac.new(self._secret, b"seed" + stream_id.encode(), hashlib.sha256).digest()
        return int.from_bytes(digest[:8]) >> 1


def _renamed(lease: Lease) -> Lease:
    """The lease of a stream that is made of another one now."""
    return replace(lease, stream_id=new_name(), accepted_at=time.time(), epoch=1)


def _reseeded(lease: Lease) -> Lease:
    """The lease of a copy that is made now."""
    requests = _with_seed(lease.requests, secrets.randbits(63))
    return _renamed(replace(lease, requests=requests))


def _with_seed(requests: tuple[Request, ...], seed: int) -> tuple[Request, ...]:
    return tuple(replace(r, sampling=replace(r.sampling, seed=seed)) for r in requests)


def _anew(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without the times of the call that made it."""
    return replace(checkpoint, queue_s=None, first_token_s=None)


def _require_same(
    first_model: str, first: Lease, model: str, again: Lease, draws_seed: bool
) -> None:
    """Raise InvalidRequest if a repeated request differs from the first with the same key."""
    requests = again.requests
    if draws_seed:
        requests = _with_seed(requests, first.requests[0].sampling.seed)
    if (first_model, first.keep_s, first.requests) != (model, again.keep_s, requests):
        raise InvalidRequest(
            "idempotency_key was used for another request: use a new key for each request"
        )
