"""Replicas that share a store, without a network. Tests start and kill them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from concertina.v1 import generation_service_pb2 as pb
from server.api.validate import generate_request, keep_s
from server.auth.api_keys import ANYONE, Caller
from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.engine.restore import ResumeCursor
from server.sessions import reviver
from server.sessions.opener import SessionOpener
from server.sessions.registry import Attachment, SessionRegistry
from server.sessions.served_model import ServedModel
from server.snapshots.codec import Snapshot
from server.snapshots.sealer import Sealer
from server.snapshots.store import Store
from server.snapshots.writer import SnapshotWriter
from tests.server.engines import LIMIT_S

SEALER = Sealer([bytes(range(32))])


async def start(
    opener: SessionOpener, model: ServedModel, wanted: pb.GenerateRequest, caller: Caller = ANYONE
) -> Attachment:
    """Starts a stream, as Generate does."""
    if not wanted.idempotency_key:
        model.require_room()
    return await opener.start(
        model,
        generate_request(model.bundle, wanted, model.config),
        caller,
        keep_s(wanted),
        wanted.idempotency_key,
        draws_seed=not wanted.sampling.HasField("seed"),
    )


class MortalWriter(SnapshotWriter):
    """A writer that stores nothing after its simulated process is dead."""

    dead = False

    @property
    def is_durable(self) -> bool:
        return not self.dead and super().is_durable

    def offer(self, *job: Any) -> None:
        if not self.dead:
            super().offer(*job)


class Replica:
    """One model with its sessions, over the store at `uri`."""

    def __init__(self, bundle: Bundle, config: EngineConfig, uri: str, ttl_s: float = 60.0) -> None:
        self.snapshots = MortalWriter(Store(uri), SEALER, ttl_s)
        self.model = ServedModel(bundle, config, self.snapshots)
        self.registry = SessionRegistry({bundle.name: self.model}, self.snapshots)
        self.opener = SessionOpener(self.registry)

    async def start(self, wanted: pb.GenerateRequest, caller: Caller = ANYONE) -> Attachment:
        """Starts a stream."""
        return await start(self.opener, self.model, wanted, caller)

    async def resume(
        self, stream_id: str, owner: str = "", cursors: Sequence[ResumeCursor] = ()
    ) -> Attachment:
        """Attaches to a stream."""
        return await reviver.resume(self.registry, stream_id, Caller(owner), cursors)

    async def adopt(self, snapshot: Snapshot) -> str:
        """Opens a session from a snapshot. Returns its name."""
        _, session = await self.opener.adopt(snapshot, ANYONE)
        return session.lease.stream_id

    async def delete(self, stream_id: str, owner: str = "") -> None:
        """Deletes a stream."""
        await self.registry.delete(stream_id, owner)

    def die(self) -> None:
        """From now on nothing is stored."""
        self.snapshots.dead = True

    def kill(self) -> None:
        """Ends it as SIGKILL does: only what is stored by then remains."""
        assert self.snapshots.flush(LIMIT_S) == 0
        self.die()
        self.model.close()

    def close(self) -> None:
        """Stops it."""
        self.model.close()
        self.snapshots.close(LIMIT_S)
