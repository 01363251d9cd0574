"""Opens sessions: for new and repeated requests, and for continued, copied and imported streams."""

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
from server.errors import InvalidRequest, StorageFailed, UnknownSession
from server.request import Lease, Request
from server.sessions.registry import NAME_BYTES, Attachment, SessionRegistry, new_name
from server.sessions.reviver import load, model_of, resume, revive
from server.sessions.served_model import ServedModel
from server.sessions.table import Session
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

        draws_seed: the caller gave no seed, so a request with another seed counts as the same.
        Raises RequestError.
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
                return await resume(self._registry, stream_id, owner, ())
        return await self.open(model, Lease(stream_id, requests, owner, keep_s, time.time()))

    async def open(
        self, model: ServedModel, lease: Lease, checkpoints: Sequence[Checkpoint] = ()
    ) -> Attachment:
        """Open a session, which continues from `checkpoints` if given.

        A session with `keep` is in the store when this returns. Raises what `ServedModel.open`
        raises, and StorageFailed.
        """
        session = model.open(lease, checkpoints)
        return await self._stored(model, session, checkpoints)

    async def adopt(self, snapshot: Snapshot) -> tuple[ServedModel, Session]:
        """Open a session from an imported snapshot, with a new name.

        Raises what `resume` raises, and StorageFailed.
        """
        attachment = revive(self._registry, snapshot, stream_id=new_name())
        if self._registry.snapshots is not None:
            await self._stored(attachment.model, attachment.session)
            self._registry.store(attachment.model, attachment.session)
        attachment.leave()
        return attachment.model, attachment.session

    async def copy(self, model: ServedModel, session: Session) -> str:
        """Copy a session that has ended, with another seed. Returns the name of the copy."""
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
        except OSError as error:
            await model.forget(session)
            _log.exception("a stream could not be stored")
            raise StorageFailed(
                "the stream cannot be stored, so it cannot be kept: try again later, or send the "
                "request without keep"
            ) from error
        except BaseException:
            attachment.leave()
            raise
        return attachment

    async def _first(self, stream_id: str, owner: str) -> tuple[str, Lease] | None:
        """Model and lease of the first request for this stream; None if there is no such stream."""
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
        """The stream name for an idempotency key. It cannot be guessed without the secret."""
        text = f"{len(owner)}:{owner}{key}".encode()
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()[: 2 * NAME_BYTES]


def _require_same(
    first_model: str, first: Lease, model: str, again: Lease, draws_seed: bool
) -> None:
    """Raise InvalidRequest if a repeated request differs from the first with the same key."""
    requests = again.requests
    if draws_seed:
        seed = first.requests[0].sampling.seed
        requests = tuple(replace(r, sampling=replace(r.sampling, seed=seed)) for r in requests)
    if (first_model, first.keep_s, first.requests) != (model, again.keep_s, requests):
        raise InvalidRequest(
            "idempotency_key was used for another request: use a new key for each request"
        )
