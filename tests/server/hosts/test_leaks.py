"""A thousand callers disconnect at random moments; nothing of them is left."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import grpc
import psutil
import pytest

from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import session_service_pb2 as session_pb
from concertina.v1.generation_service_pb2_grpc import GenerationServiceStub
from concertina.v1.session_service_pb2_grpc import SessionServiceStub
from server.api.servicers import make_servicers
from server.bundles.bundle import Bundle
from server.config import EngineConfig, ServeConfig
from server.hosts.local import make_server
from server.ops.ports import free_ports
from server.sessions.served_model import ServedModel
from server.snapshots.names import TOMBSTONE
from server.snapshots.sealer import Sealer
from server.snapshots.store import Store
from server.snapshots.writer import SnapshotWriter
from tests.server.engines import LIMIT_S, is_empty, until

KEEP_MS, TTL_S = 50, 0.05
AT_ONCE = 24
POOL_THREADS = 6  # asyncio starts them when needed, and keeps them
TOLERANCE_BYTES = 8 * 1024 * 1024
"""Freed memory that the allocator may keep."""


class Crowd:
    """Callers that disconnect before the end of their streams."""

    def __init__(self, channel: grpc.aio.Channel, seed: int) -> None:
        self._generation = GenerationServiceStub(channel)
        self._sessions = SessionServiceStub(channel)
        self._room = asyncio.Semaphore(AT_ONCE)
        self._rng = random.Random(seed)
        self.deleted: set[str] = set()
        self.left = {
            "cut": 0,
            "deleted": 0,
            "before a token": 0,
            "while it ran": 0,
            "at its end": 0,
        }

    async def come_and_go(self, count: int) -> None:
        """Runs streams, half of which are cut and half deleted."""
        await asyncio.gather(*(self._one(index) for index in range(count)))

    async def _one(self, index: int) -> None:
        rng, deleted = self._rng, index % 2 == 1
        request = pb.GenerateRequest(
            prompt={"tokens": {"ids": rng.choices(range(256), k=rng.choice([1, 30, 70]))}},
            stopping={"max_tokens": rng.randint(1, 26), "ignore_eos": True},
            sampling={"seed": index, "repetition_penalty": rng.choice([1.0, 1.2])},
            output={"n": rng.choice([1, 1, 3])},
            keep={"seconds": 60} if deleted else {"nanos": KEEP_MS * 1_000_000},
        )
        async with self._room:
            call = self._generation.Generate(request, timeout=LIMIT_S)
            seen = [
                event async for event in self._some(call, rng.choice([0, 1, 1, 2, 3, 5, 8, 99]))
            ]
            tokens, ended = (any(e.HasField(f) for e in seen) for f in ("tokens", "finished"))
            moment = "at its end" if ended else "while it ran" if tokens else "before a token"
            self.left[moment] += 1
            self.left["deleted" if deleted else "cut"] += 1
            if deleted and seen and rng.random() < 0.5:  # one reads on while it is deleted
                await self._delete(seen)
            call.cancel()
            if deleted:
                await self._delete(seen)

    async def _some(
        self, call: AsyncIterator[pb.GenerateResponse], count: int
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Reads some events, if they come, and waits a while."""
        with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            async for event in call:
                if not event.HasField("error"):
                    yield event
                if (count := count - 1) < 0:
                    break
        await asyncio.sleep(self._rng.choice([0, 0, 0.001, 0.005]))

    async def _delete(self, seen: list[pb.GenerateResponse]) -> None:
        if seen:
            name = seen[0].accepted.stream_id
            await self._sessions.Delete(session_pb.DeleteRequest(stream_id=name), timeout=LIMIT_S)
            self.deleted.add(name)


@pytest.mark.parametrize("cancels", [100, pytest.param(1_000, marks=pytest.mark.slow)])
async def test_disconnected_callers_leave_nothing(
    cancels: int, text: Bundle, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    store = Store(f"file://{tmp_path}/store")
    writer = SnapshotWriter(store, Sealer.for_this_process(), 60.0)
    # The prefix cache grows up to its limit: that is not a leak.
    model = ServedModel(
        text, EngineConfig(slots=4, threads=1, snapshot_interval=8, prefix_cache_bytes=0), writer
    )
    server = make_server(
        ServeConfig((text.folder,), port=port), make_servicers(None, {text.name: model}, writer)
    )
    await server.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")

    async def crowd(count: int, seed: int) -> tuple[int, int]:
        """Memory and threads after all callers are gone and their sessions are deleted."""
        callers = Crowd(channel, seed)
        await callers.come_and_go(count)
        assert callers.left["cut"] == callers.left["deleted"] == count // 2
        assert min(callers.left.values()) >= count // 20, callers.left
        await until(lambda: is_empty(model), 20)
        assert await asyncio.to_thread(writer.flush, LIMIT_S) == 0
        left = [path for path in tmp_path.rglob("*") if path.parent.name in callers.deleted]
        assert {path.name for path in left} <= {TOMBSTONE}
        await asyncio.sleep(TTL_S * 2)
        store.sweep(TTL_S)
        left = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert {path.parent.name for path in left} <= {".sweeps"}  # every ten minutes, a new one
        gc.collect()
        return psutil.Process().memory_info().rss, threading.active_count()

    try:
        before, threads = await crowd(100, seed=1)
        after, threads_after = await crowd(cancels, seed=2)
        assert after - before < TOLERANCE_BYTES
        assert threads_after <= threads + POOL_THREADS
    finally:
        await channel.close()
        await server.stop(None)
        model.close()
        writer.close(LIMIT_S)
