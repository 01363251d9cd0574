"""Concertina's own engine, or its steps alone, on a bundle with random weights."""

from __future__ import annotations

import asyncio
import time

import numpy as np

from concertina.v1 import bundle_pb2 as pb
from loadtest.bench.adapters.adapter import Session, Setting, Window
from server.bundles.bundle import Bundle, load_bundle
from server.config import EngineConfig
from server.engine.engine import Engine
from server.engine.events import Delta, Request
from server.engine.kv_cache import Cache, Parked
from server.engine.sampling.sampler import SamplingParameters
from server.engine.stream import Stream
from server.runtime.host_state import State
from server.runtime.onnx_session import Runtime

_FILLER = np.float32(0.01)


def prepare(setting: Setting) -> None:
    """See Adapter."""
    from loadtest.bench.bundles import make_bundle  # needs torch, which nothing else here does

    make_bundle(setting.folder, setting.shape, setting.context + setting.room, setting.span)


def open_session(setting: Setting) -> Session:
    """See Adapter."""
    bundle = load_bundle(setting.folder)
    if setting.variant == "steps":
        return _Steps(bundle, setting)
    return _Streams(bundle, setting)


def first_token_s(setting: Setting) -> float:
    """See Adapter."""
    engine = Engine(load_bundle(setting.folder), EngineConfig(slots=1, threads=setting.threads))
    try:
        asyncio.run(_generate(engine, _request(engine.bundle, prompt=setting.span or 64)))
        arrivals = asyncio.run(_generate(engine, _request(engine.bundle, prompt=setting.context)))
    finally:
        engine.close()
    return arrivals[0][0]


class _Streams:
    """Streams of an engine, read to their end by asyncio as the servicer reads them."""

    def __init__(self, bundle: Bundle, setting: Setting) -> None:
        self._streams = setting.streams
        self._engine = Engine(bundle, EngineConfig(slots=setting.streams, threads=setting.threads))
        _begin_at(self._engine._loop.cache, bundle, setting.context)

    @property
    def cache_bytes(self) -> int:
        """See Session."""
        return self._engine.bundle.max_state_bytes

    def decode(self, steps: int) -> Window:
        """See Session. The window is the time in which every stream decodes."""
        return asyncio.run(self._decode(steps))

    async def _decode(self, steps: int) -> Window:
        epoch = time.perf_counter()
        reads = [
            _read(self._engine, self._engine.submit(request), epoch)
            for request in (
                _request(self._engine.bundle, tokens=steps + 1, seed=seed)
                for seed in range(self._streams)
            )
        ]
        streams = await asyncio.gather(*reads)
        began = max(arrivals[0][0] for arrivals in streams)
        ended = min(arrivals[-1][0] for arrivals in streams)
        if began >= ended:  # so few steps that the reader got them all at one look
            began, ended = 0.0, max(arrivals[-1][0] for arrivals in streams)
        tokens = sum(n for arrivals in streams for at, n in arrivals if began < at <= ended)
        return Window(tokens, ended - began)

    def close(self) -> None:
        """See Session."""
        self._engine.close()


class _Steps:
    """The same steps and folds, without scheduler, sampler or readers."""

    def __init__(self, bundle: Bundle, setting: Setting) -> None:
        self._bundle = bundle
        self._streams = setting.streams
        self._cache = Cache(
            bundle, Runtime(bundle, setting.streams + 1, setting.threads), setting.streams
        )
        _begin_at(self._cache, bundle, setting.context)

    @property
    def cache_bytes(self) -> int:
        """See Session."""
        return self._bundle.max_state_bytes

    def decode(self, steps: int) -> Window:
        """See Session."""
        self._cache.clear()
        for _ in range(self._streams):
            self._cache.begin()
        tokens = np.zeros(self._streams, np.int64)
        began = time.perf_counter()
        for _ in range(steps):
            self._cache.step(tokens)
            self._cache.fold()
        return Window(steps * self._streams, time.perf_counter() - began)

    def close(self) -> None:
        """See Session."""


def _begin_at(cache: Cache, bundle: Bundle, context: int) -> None:
    """Make streams begin where a prompt of `context` tokens would have left them.

    Its place, length and folds are those of a real one; only the content of its state is made up.
    """
    state: State = {}
    for tensor in bundle.manifest.state:
        shape = list(tensor.shape)
        if tensor.kind == pb.STATE_KIND_STACK:
            shape[1] = bundle.entries(context)
        value = tensor.initial if tensor.kind == pb.STATE_KIND_RECURRENT else _FILLER
        state[tensor.name] = np.broadcast_to(np.float32(value), shape)
    parked = Parked(state, context)
    cache.begin = lambda: cache.restore(parked)  # type: ignore[method-assign]


def _request(bundle: Bundle, *, prompt: int = 0, tokens: int = 1, seed: int = 0) -> Request:
    vocabulary = bundle.manifest.vocabulary
    ids = np.random.default_rng(seed).integers(vocabulary, size=prompt)
    return Request(
        prompt=np.concatenate(([vocabulary], ids)),
        sampling=SamplingParameters(seed=seed),
        max_tokens=tokens,
    )


async def _generate(engine: Engine, request: Request) -> list[tuple[float, int]]:
    epoch = time.perf_counter()
    return await _read(engine, engine.submit(request), epoch)


async def _read(engine: Engine, stream: Stream, epoch: float) -> list[tuple[float, int]]:
    """When tokens of a stream arrived, in seconds since `epoch`, and how many each time."""
    arrivals = []
    async for event in engine.events(stream):
        if isinstance(event, Delta) and event.tokens:
            arrivals.append((time.perf_counter() - epoch, len(event.tokens)))
        elif isinstance(event, Exception):
            raise event
    return arrivals
