"""Streams by name, wherever they are: in an engine of this process, or in the store."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from concertina.v1 import generation_service_pb2 as pb
from server.api.validate import generate_request
from server.auth.api_keys import Caller
from server.auth.quota import require_room
from server.engine.engine import Engine
from server.engine.events import Request
from server.engine.stream import Past, Terms
from server.errors import (
    EngineStopped,
    InvalidRequest,
    SnapshotRefused,
    StorageFailed,
    UnknownModel,
    UnknownSession,
)
from server.ops import metrics
from server.sessions.subscriber import NOTHING, Reader, Received
from server.sessions.table import Session
from server.snapshots.snapshots import Keeper, Stored, past_from

_log = logging.getLogger(__name__)
_NAME_BYTES = 16
_FLUSH_S = 30.0


@dataclass(frozen=True)
class Following:
    """A session and those who follow it from here on."""

    engine: Engine
    session: Session
    readers: tuple[Reader, ...]


async def hand_over(engines: Iterable[Engine], keeper: Keeper | None) -> None:
    """Have everything stored that can go on elsewhere, and send its readers there."""
    if keeper is None or not keeper.is_durable:
        return
    for engine in engines:
        with suppress(EngineStopped):
            await engine.hand_over()
    await asyncio.to_thread(keeper.flush, _FLUSH_S)


class Sessions:
    """Opens, finds and revives the sessions of the engines of a process.

    What is new is for `engines`; those that are `leaving` finish what they began. Both may change.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        keeper: Keeper | None,
        leaving: Collection[Engine] = (),
    ) -> None:
        self.engines = engines
        self.keeper = keeper
        self._leaving = leaving
        self._secret = keeper.secret if keeper else secrets.token_bytes(32)

    @property
    def holders(self) -> list[Engine]:
        """All engines that may hold sessions."""
        return [*self.engines.values(), *self._leaving]

    def running(self, owner: str) -> int:
        """Streams of a caller that wait or run in this process."""
        return sum(
            not stream.ended
            for engine in self.holders
            for session in engine.sessions(owner)
            for stream in session.streams
        )

    def is_durable(self, session: Session) -> bool:
        """Whether it survives this process."""
        return self.keeper is not None and self.keeper.is_durable and session.terms.keep_s > 0

    async def start(self, engine: Engine, request: pb.GenerateRequest, caller: Caller) -> Following:
        """Begin a stream; or follow the one that an earlier request with this key began.

        Raises RequestError.
        """
        owner = caller.name
        if not request.idempotency_key:  # with one, there may be nothing to take on
            engine.require_room()  # first, since it costs least: refusals come in floods
        requests = generate_request(engine.bundle, request, engine.config)
        if not self._attaches(request, owner):
            require_room(caller, self.running, len(requests))
        if not request.idempotency_key:
            stream_id = new_name()
        else:
            stream_id = self._name(owner, request.idempotency_key)
            first = await self._first_request(stream_id, owner)
            if first is not None:
                _check_same(request, first)
                return await self.follow(stream_id, owner, [NOTHING] * len(requests))
        terms = Terms(stream_id, owner, keep_s(request), origin(request, requests[0]), time.time())
        session = engine.open(terms, requests)
        return await self._begun(engine, session)

    async def _begun(
        self, engine: Engine, session: Session, pasts: Sequence[Past] = ()
    ) -> Following:
        """A session that was just opened, once it is in the store if it shall outlive us."""
        following = Following(engine, session, session.readers)
        if self.keeper is None or not session.terms.keep_s:
            return following
        try:
            await asyncio.to_thread(self.keeper.begin, engine.bundle, session.terms, pasts)
        except OSError as error:
            await engine.forget(session)
            _log.exception("a stream could not be stored")
            raise StorageFailed(
                "the stream cannot be stored, so it would not survive: try again later, or ask "
                "without keep"
            ) from error
        except BaseException:
            engine.leave(session, following.readers)
            raise
        return following

    async def follow(self, stream_id: str, owner: str, received: Sequence[Received]) -> Following:
        """The rest of a stream behind what was `received` of its outputs.

        Raises UnknownSession, SnapshotRefused, InvalidRequest, Overloaded, EngineStopped.
        """
        if (held := self.held(stream_id, owner)) is None:
            stored = await self._load(stream_id, owner)
            held = self.held(stream_id, owner)  # somebody may have been faster
            if held is None:
                return await self._revive(stored, received)
        engine, session = held
        received = padded(received, len(session.streams))
        readers = await engine.attach(session, received)
        metrics.RESUMED.labels(engine.bundle.name, "memory").inc()
        return Following(engine, session, readers)

    def held(self, stream_id: str, owner: str) -> tuple[Engine, Session] | None:
        """The session, if an engine of this process has it."""
        for engine in self.holders:
            if (session := engine.find(stream_id, owner)) is not None:
                return engine, session
        return None

    async def at_rest(self, stream_id: str, owner: str) -> tuple[Engine, Session]:
        """A session, brought here from the store if no engine of this process has it.

        One that was running elsewhere goes on here. Raises as `follow` does.
        """
        if (held := self.held(stream_id, owner)) is not None:
            return held
        following = await self.follow(stream_id, owner, ())
        following.engine.leave(following.session, following.readers)
        return following.engine, following.session

    async def adopt(self, stored: Stored, stream_id: str) -> tuple[Engine, Session]:
        """A session made of a snapshot, under another name. Raises as `follow` does."""
        stored.header.stream_id = stream_id
        following = await self._revive(stored, ())
        if self.keeper is not None:
            await self._begun(following.engine, following.session)
            self.store(following.engine, following.session)
        following.engine.leave(following.session, following.readers)
        return following.engine, following.session

    async def reopen(
        self, engine: Engine, terms: Terms, requests: Sequence[Request], pasts: Sequence[Past]
    ) -> Following:
        """A session that goes on behind `pasts`. Raises Overloaded, StorageFailed."""
        return await self._begun(engine, engine.open(terms, requests, pasts), pasts)

    async def stored(self, owner: str) -> list[str]:
        """Names of the caller's streams in the store. Raises StorageFailed."""
        if self.keeper is None:
            return []
        try:
            return await asyncio.to_thread(self.keeper.streams, owner)
        except OSError:
            _log.exception("the store cannot be listed")
            raise StorageFailed("the snapshots cannot be listed: try again later") from None

    def store(self, engine: Engine, session: Session) -> None:
        """Have a session written that rests."""
        if self.keeper is not None and session.terms.keep_s:
            for output, past in enumerate(session.pasts):
                self.keeper.offer(engine.bundle, session.terms, output, past)

    async def delete(self, stream_id: str, owner: str) -> None:
        """End a stream, if it is there, and forget it. Raises StorageFailed, EngineStopped."""
        await self._forget_held(stream_id, owner)
        if self.keeper is not None:
            try:
                await asyncio.to_thread(self.keeper.forget, Terms(stream_id, owner))
            except FileNotFoundError:
                pass
            except OSError:
                _log.exception("a stream could not be deleted")
                raise StorageFailed("the snapshots cannot be deleted: try again later") from None
            # Somebody may have brought it back from the store meanwhile.
            await self._forget_held(stream_id, owner)

    async def _forget_held(self, stream_id: str, owner: str) -> None:
        if (held := self.held(stream_id, owner)) is not None:
            engine, session = held
            await engine.forget(session)

    async def _first_request(self, stream_id: str, owner: str) -> pb.GenerateRequest | None:
        """What the stream of that name was begun with; None if there is none."""
        if (held := self.held(stream_id, owner)) is not None:
            return pb.GenerateRequest.FromString(held[1].terms.origin)
        try:
            return (await self._load(stream_id, owner)).snapshot.request
        except UnknownSession:
            return None

    async def _load(self, stream_id: str, owner: str) -> Stored:
        stored = None
        if self.keeper is not None:
            try:
                stored = await asyncio.to_thread(self.keeper.load, owner, stream_id)
            except OSError:
                _log.exception("a snapshot could not be read")
                raise StorageFailed("the snapshots cannot be read: try again later") from None
        if stored is None:
            raise UnknownSession(
                f"stream {stream_id[:64]!r} is not known: it was never asked to be kept, or it is "
                "over and was kept long enough"
            )
        return stored

    async def _revive(self, stored: Stored, received: Sequence[Received]) -> Following:
        header, request = stored.header, stored.snapshot.request
        engine = self.engines.get(header.model)
        if engine is None:
            raise UnknownModel(f"the stream is of model {header.model!r}, not served here")
        if header.fingerprint != engine.bundle.manifest.fingerprint:
            raise SnapshotRefused(
                f"the snapshot is of another bundle of {header.model!r}: its fingerprint is "
                f"{header.fingerprint[:16]}, the one served has "
                f"{engine.bundle.manifest.fingerprint[:16]}"
            )
        requests = generate_request(engine.bundle, request, engine.config)
        empty = engine.empty_past
        pasts = [empty] * len(requests)
        if not keep_s(request):
            raise SnapshotRefused("the snapshot is of a stream that was not to be kept")
        for told in stored.snapshot.outputs:
            if (output := told.output) < len(pasts):
                pasts[output] = past_from(engine.bundle, requests[output], told)
        terms = Terms(
            header.stream_id,
            header.owner,
            keep_s(request),
            request.SerializeToString(),
            min(max(0.0, header.accepted.ToNanoseconds() / 1e9), time.time()),
        )
        received = padded(received, len(requests))
        _check_ids(engine, received)
        session = engine.open(terms, requests, pasts, received)
        metrics.RESUMED.labels(engine.bundle.name, "store").inc()
        return Following(engine, session, session.readers)

    def _name(self, owner: str, key: str) -> str:
        """The name of the stream of an idempotency key; nobody can guess it without our secret."""
        said = f"{len(owner)}:{owner}{key}".encode()
        return hmac.new(self._secret, said, hashlib.sha256).hexdigest()[: 2 * _NAME_BYTES]

    def _attaches(self, request: pb.GenerateRequest, owner: str) -> bool:
        """Whether the request has the key of a stream that is held here, and begins none."""
        key = request.idempotency_key
        return bool(key) and self.held(self._name(owner, key), owner) is not None


def new_name() -> str:
    """A name that nobody can guess."""
    return secrets.token_hex(_NAME_BYTES)


def origin(request: pb.GenerateRequest, first: Request) -> bytes:
    """The request as it is stored: with the seed that was drawn for it."""
    kept = pb.GenerateRequest()
    kept.CopyFrom(request)
    kept.sampling.seed = first.sampling.seed
    return kept.SerializeToString(deterministic=True)


def padded(received: Sequence[Received], outputs: int) -> list[Received]:
    """What was received of every output. Raises InvalidRequest where there are too many."""
    if len(received) > outputs:
        raise InvalidRequest(
            f"received names output {len(received) - 1}, the stream has outputs 0 to {outputs - 1}"
        )
    return [*received, *[NOTHING] * (outputs - len(received))]


def keep_s(request: pb.GenerateRequest) -> float:
    """How long a stream is kept without a reader, in seconds."""
    return float(request.keep.seconds + request.keep.nanos / 1e9)


def _check_ids(engine: Engine, received: Sequence[Received]) -> None:
    """That the tokens a reader knows, which are pushed again, are tokens of the model."""
    vocabulary = engine.bundle.manifest.vocabulary
    highest = max((max(had.last_ids, default=0) for had in received), default=0)
    if highest >= vocabulary:
        raise InvalidRequest(
            f"received.last_ids has {highest}; ids of {engine.bundle.name} must be below "
            f"{vocabulary}"
        )


def _check_same(request: pb.GenerateRequest, first: pb.GenerateRequest) -> None:
    """That a request with a key that was used before is the same request."""
    again = pb.GenerateRequest()
    again.CopyFrom(request)
    if not again.sampling.HasField("seed"):
        again.sampling.seed = first.sampling.seed
    if again.SerializeToString(deterministic=True) != first.SerializeToString(deterministic=True):
        raise InvalidRequest(
            "idempotency_key was used for another request: use a new key for each request"
        )
