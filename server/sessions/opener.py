"""New sessions: begun, begun again by their idempotency key, continued, copied, imported."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace

from server.auth.api_keys import Caller
from server.auth.quota import require_room
from server.checkpoint import Checkpoint
from server.errors import Displaced, InvalidRequest, StorageFailed, UnknownSession
from server.request import Lease, Request
from server.sessions.registry import NAME_BYTES, Attachment, SessionRegistry, new_name
from server.sessions.reviver import follow, load, model_of, revive
from server.sessions.served_model import ServedModel
from server.sessions.table import Session
from server.snapshots.codec import Snapshot, restored
from server.snapshots.writer import AlreadyClaimed

_log = logging.getLogger(__name__)


class SessionOpener:
    """Opens sessions on the models of a `registry`, and has them stored before they are used."""

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
        """Begin a stream; or follow the one that an earlier request with this key began.

        draws_seed: the caller gave no seed, so any seed is the same request. Raises RequestError.
        """
        owner, running = caller.name, self._registry.running
        if not idempotency_key:
            require_room(caller, running, len(requests))
            stream_id = new_name()
        else:
            stream_id = self._name(owner, idempotency_key)
            if self._registry.held(stream_id, owner) is None:
                require_room(caller, running, len(requests))
            first = await self._first(stream_id, owner)
            if first is not None:
                again = Lease(stream_id, requests, owner, keep_s)
                _require_same(*first, model.bundle.name, again, draws_seed)
                return await follow(self._registry, stream_id, owner, ())
        return await self.open(model, Lease(stream_id, requests, owner, keep_s, time.time()))

    async def open(
        self, model: ServedModel, lease: Lease, checkpoints: Sequence[Checkpoint] = ()
    ) -> Attachment:
        """A session that goes on behind `checkpoints`, if given. Raises Overloaded, StorageFailed.

        When this returns it is in the store, if it shall outlive this process.
        """
        session = model.open(lease, checkpoints)
        return await self._stored(model, session, checkpoints)

    async def adopt(self, snapshot: Snapshot) -> tuple[ServedModel, Session]:
        """A session made of a snapshot, under a name of its own. Raises as `follow` does."""
        attachment = revive(self._registry, snapshot, stream_id=new_name())
        if self._registry.snapshots is not None:
            await self._stored(attachment.model, attachment.session)
            self._registry.store(attachment.model, attachment.session)
        attachment.leave()
        return attachment.model, attachment.session

    async def copy(self, model: ServedModel, session: Session) -> str:
        """The name of a copy of a session that rests; it draws other random numbers."""
        lease, seed = session.lease, secrets.randbits(63)
        requests = tuple(
            replace(request, sampling=replace(request.sampling, seed=seed))
            for request in lease.requests
        )
        copied = replace(lease, stream_id=new_name(), requests=requests)
        attachment = await self.open(model, copied, session.checkpoints)
        attachment.leave()
        return copied.stream_id

    async def _stored(
        self, model: ServedModel, session: Session, checkpoints: Sequence[Checkpoint] = ()
    ) -> Attachment:
        attachment = Attachment(model, session, session.subscribers)
        snapshots = self._registry.snapshots
        if snapshots is None or not session.lease.keep_s:
            return attachment
        try:
            await asyncio.to_thread(snapshots.begin, model.bundle, session.lease, checkpoints)
        except AlreadyClaimed as error:
            await model.forget(session)
            raise Displaced(f"the stream cannot go on here: {error}") from None
        except OSError as error:
            await model.forget(session)
            _log.exception("a stream could not be stored")
            raise StorageFailed(
                "the stream cannot be stored, so it would not survive: try again later, or ask "
                "without keep"
            ) from error
        except BaseException:
            attachment.leave()
            raise
        return attachment

    async def _first(self, stream_id: str, owner: str) -> tuple[str, Lease] | None:
        """Model and lease with which the stream of that name began; None if there is none."""
        if (held := self._registry.held(stream_id, owner)) is not None:
            model, session = held
            return model.bundle.name, session.lease
        try:
            snapshot = await load(self._registry, stream_id, owner)
        except UnknownSession:
            return None
        lease, _ = restored(model_of(self._registry, snapshot).bundle, snapshot)
        return snapshot.model, lease

    def _name(self, owner: str, key: str) -> str:
        """The name of the stream of an idempotency key; nobody can guess it without our secret."""
        text = f"{len(owner)}:{owner}{key}".encode()
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()[: 2 * NAME_BYTES]


def _require_same(
    first_model: str, first: Lease, model: str, again: Lease, draws_seed: bool
) -> None:
    """That a request with a key that was used before is the same request."""
    requests = again.requests
    if draws_seed:
        seed = first.requests[0].sampling.seed
        requests = tuple(replace(r, sampling=replace(r.sampling, seed=seed)) for r in requests)
    if (first_model, first.keep_s, first.requests) != (model, again.keep_s, requests):
        raise InvalidRequest(
            "idempotency_key was used for another request: use a new key for each request"
        )
