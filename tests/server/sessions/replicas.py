"""Replicas of a server on a stage (see `gates`), which share a store, and the calls to them."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
from fsspec.implementations.memory import MemoryFileSystem

from concertina.v1 import bundle_pb2
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import session_service_pb2 as session_pb
from server.api.generation import GenerationServicer
from server.api.sessions import SessionServicer
from server.arrays import Floats, Ints, State
from server.auth.api_keys import Caller, Callers
from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.engine.sampling.sampler import SamplingBatch, sample
from server.request import SamplingParameters
from server.runtime.host_state import EMPTY, StateLength
from server.sessions.opener import SessionOpener
from server.sessions.registry import SessionRegistry, hand_over
from server.sessions.served_model import ServedModel
from server.snapshots.backends import Backend, Memory
from server.snapshots.sealer import Sealer
from server.snapshots.store import Store
from server.snapshots.writer import SnapshotWriter
from tests.server.sessions.gates import Process, Stage

ANN = Caller("ann", max_streams=2)
CALLERS = {"ann": ANN, "bob": Caller("bob")}
VOCABULARY, CONTEXT = 128, 96
KEEP_S, TTL_S = 1000.0, 1e6
CONFIG = EngineConfig(slots=2, queue_limit=60, stream_buffer=6, snapshot_interval=3, threads=1)
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)


def small_bundle() -> Bundle:
    """A bundle without a graph, whose state is the tokens so far."""
    manifest = bundle_pb2.Manifest(
        name="small",
        fingerprint="f" * 64,
        modality=bundle_pb2.MODALITY_TEXT,
        vocabulary=VOCABULARY,
        context=CONTEXT,
    )
    manifest.state.add(
        name="seen",
        kind=bundle_pb2.STATE_KIND_HISTORY,
        data_type=bundle_pb2.DATA_TYPE_FLOAT32,
        shape=[CONTEXT],
    )
    return Bundle(Path("nowhere"), manifest)


BUNDLE = small_bundle()


def logits_after(tokens: Iterable[float]) -> Floats:
    """Logits `[vocabulary]` after these tokens, each of which matters: three letters are likely."""
    mixed = zlib.crc32(np.array([*tokens], np.float32).tobytes())
    logits = np.full(VOCABULARY, -1e9, np.float32)
    logits[_LETTERS[[mixed % 26, mixed // 26 % 26, mixed // 676 % 26]]] = 0
    return logits


@cache
def story(prompt: bytes, seed: int, end: int) -> tuple[int, ...]:
    """The tokens up to position `end` of a stream that nothing disturbs."""
    if end <= len(prompt):
        return tuple(prompt[:end])
    before = story(prompt, seed, end - 1)
    batch = SamplingBatch.of([SamplingParameters(seed=seed)])
    drawn = sample(logits_after((VOCABULARY, *before))[None], batch, np.array([len(before)]))
    return (*before, int(drawn[0]))


class SmallRuntime:
    """Runs `small_bundle`. Before each pass it stands at a gate."""

    nbytes = 0

    def __init__(self, stage: Stage, rows: int) -> None:
        self._stage = stage
        self._seen = np.zeros((rows, CONTEXT), np.float32)

    def step(self, tokens: Ints, positions: Ints, lengths: Ints) -> Floats:
        self._stage.gate("engine", f"steps {len(tokens)}")
        rows = np.arange(len(tokens))
        self._seen[rows, positions] = tokens
        return np.stack([logits_after(self._seen[row, : positions[row] + 1]) for row in rows])

    def prefill(
        self, row: int, tokens: Ints, position: int, length: int, logits: bool = False
    ) -> Floats:
        assert not logits
        self._stage.gate("engine", "prefills")
        self._seen[row, position : position + len(tokens)] = tokens
        return np.zeros((0, VOCABULARY), np.float32)

    def reset(self, row: int) -> None:
        self._seen[row] = -1

    def move(self, source: int, target: int, length: StateLength) -> None:
        self.write(target, length, self.read(source, length))
        self.reset(source)

    def read(self, row: int, end: StateLength, begin: StateLength = EMPTY) -> State:
        return {"seen": self._seen[row, begin.tokens : end.tokens].copy()}

    def write(self, row: int, end: StateLength, state: State) -> None:
        self.reset(row)
        self._seen[row, : end.tokens] = state["seen"]


class Shelf(MemoryFileSystem):  # type: ignore[misc]
    """The memory in which the objects of one test lie."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.pseudo_dirs = [""]


class GatedBackend:
    """A back end each of whose operations stands at a gate first: is done, fails, or is done
    without an answer, which then has a gate of its own."""

    def __init__(self, stage: Stage, backend: Backend) -> None:
        self._stage = stage
        self._backend = backend

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation: Callable[..., Any] = getattr(self._backend, name)

        def gated(path: str, *rest: Any) -> Any:
            what = f"{name} {path[-24:]}"
            outcome = self._stage.gate("store", what)
            if outcome == "fails":
                raise OSError(errno.EIO, "the store is away")
            result = operation(path, *rest)
            if outcome == "lands":
                self._stage.gate("answer", what)
            return result

        return gated


class Keyless(Callers):
    """Believes every caller."""

    def __init__(self) -> None:
        super().__init__(None)

    def of(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        return CALLERS[str(dict(metadata)["caller"])]


class Replica:
    """All that a server is made of, but for its port."""

    def __init__(self, stage: Stage, shelf: Shelf, name: str) -> None:
        self.stage = stage
        self.process = Process(name)
        self.drained: asyncio.Task[None] | None = None
        with stage.inside(self.process):
            store = Store("file:///nowhere")
            store.backend = cast(Backend, GatedBackend(stage, Memory(shelf)))
            self.snapshots = SnapshotWriter(store, Sealer([bytes(32)]), TTL_S)
            self.model = ServedModel(BUNDLE, CONFIG, self.snapshots)
            self.registry = SessionRegistry({BUNDLE.name: self.model}, self.snapshots)
            opener = SessionOpener(self.registry)
            self._generation = GenerationServicer(self.registry, opener, Keyless())
            self._sessions = SessionServicer(self.registry, opener, Keyless())

    @property
    def name(self) -> str:
        return self.process.name

    def kill(self) -> None:
        """It vanishes, with what it has not told anybody."""
        self.stage.kill(self.process)

    def drain(self) -> None:
        """Begin to hand its streams over."""
        if self.drained is not None:
            return
        with self.stage.inside(self.process):
            self.drained = self.stage.loop.create_task(hand_over([self.model], self.snapshots))
        self.stage.settle()

    @property
    def is_drained(self) -> bool:
        return self.drained is not None and self.drained.done()

    def call(self, caller: str, method: str, request: Any) -> Call:
        """Begin a call."""
        servicer = self._sessions if hasattr(self._sessions, method) else self._generation
        return Call(self, caller, method, getattr(servicer, method), request)


class Call:
    """A call to a replica, seen by the client."""

    def __init__(
        self, replica: Replica, caller: str, method: str, function: Any, request: Any
    ) -> None:
        self.replica = replica
        self.caller = caller
        self.method = method
        self.request = request
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.given_up = False
        self.answer: Any = None
        self.events: list[Any] = []
        self._take: Callable[[Any], None] = self.events.append
        self._function = function
        with replica.stage.inside(replica.process):
            self.task = replica.stage.loop.create_task(self._run())

    # ---- for the client

    @property
    def cut(self) -> bool:
        """Whether no more will come, because the replica died."""
        return self.replica.process.dead and not self.task.done()

    @property
    def over(self) -> bool:
        return self.task.done() or self.cut or self.given_up

    @property
    def ok(self) -> bool:
        """Whether it ended with the status OK."""
        return self.task.done() and not self.given_up and self.code is None

    def give_up(self) -> None:
        """The client is gone."""
        self.given_up = True
        self.task.cancel()
        self.replica.stage.settle()

    # ---- for the servicer

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        return (("caller", self.caller),)

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: list[Any]) -> None:
        pass

    async def _run(self) -> None:
        returned = self._function(self.request, self)
        if isinstance(returned, Awaitable):
            self.answer = await returned
            return
        async for event in cast(AsyncIterator[Any], returned):
            if not self.given_up:
                self.events.append(event)

    def __repr__(self) -> str:
        return f"{self.method} at {self.replica.name}"


def imported(sealed: bytes) -> AsyncIterator[session_pb.ImportRequest]:
    """The messages of an Import."""

    async def send() -> AsyncIterator[session_pb.ImportRequest]:
        yield session_pb.ImportRequest(part=sealed, sha256=hashlib.sha256(sealed).digest())

    return send()


def wanted(prompt: bytes, seed: int, size: int, kept: bool, key: str) -> pb.GenerateRequest:
    """A request for a stream of `size` tokens."""
    return pb.GenerateRequest(
        prompt={"text": prompt.decode()},
        sampling={"seed": seed},
        stopping={"max_tokens": size},
        keep={"seconds": int(KEEP_S)} if kept else None,
        idempotency_key=key,
    )
