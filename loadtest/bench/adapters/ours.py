"""Concertina's own engine, or its steps alone, in this process.

The only module of the load tester that knows the server: what else measures the engine does it with
the functions of this one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loadtest.bench.adapters.adapter import FirstToken, Session, Setting, Window
from server.arrays import State
from server.bundles.bundle import Bundle, load_bundle
from server.bundles.state import StateKind
from server.checkpoint import Checkpoint, SavedState
from server.config import EngineConfig
from server.engine.kv_cache import Cache
from server.request import Lease, Prompt, Request, SamplingParameters, prompt_of
from server.runtime.onnx_session import Runtime
from server.sessions.served_model import ServedModel
from server.sessions.subscriber import Delta
from server.sessions.table import Session as Streams

_WARM_UP_TOKENS = 64
_FILLER = np.float32(0.01)


def prepare(setting: Setting) -> None:
    """See Adapter."""
    # Needs torch, which nothing else here does.
    from loadtest.bench.adapters.bundles import make_bundle, make_bundle_of

    if setting.source is not None:
        make_bundle_of(
            setting.source, setting.folder, setting.context + setting.room, setting.state
        )
        return
    make_bundle(
        setting.folder,
        setting.shape,
        setting.context + setting.room,
        setting.span,
        setting.weights,
        setting.state,
    )


def open_session(setting: Setting) -> Session:
    """See Adapter."""
    bundle = load_bundle(setting.folder)
    if setting.mode == "steps":
        return _Steps(bundle, setting)
    return _Streams(bundle, setting)


def open_prompt(setting: Setting) -> FirstToken:
    """See Adapter. Every prompt is another one: the engine keeps the blocks of prompts."""
    config = EngineConfig(slots=1, threads=setting.threads, provider=setting.device)
    model = ServedModel(load_bundle(setting.folder), config)
    asyncio.run(_generate(model, min(_WARM_UP_TOKENS, setting.context), seed=0))
    seeds = count(1)
    return lambda: asyncio.run(_generate(model, setting.context, next(seeds)))[0][0]


@contextmanager
def open_engine(
    folder: Path, *, slots: int, threads: int, draft_tokens: int = 0
) -> Iterator[ServedModel]:
    """The engine on the bundle in `folder`, with its sessions; threads: 0 for every core."""
    config = EngineConfig(slots=slots, threads=threads, draft_tokens=draft_tokens)
    model = ServedModel(load_bundle(folder), config)
    try:
        yield model
    finally:
        model.close()


def generate(
    model: ServedModel,
    prompt: npt.NDArray[np.int64],
    *,
    tokens: int,
    seed: int = 0,
    temperature: float = 1.0,
) -> AsyncIterator[tuple[int, ...]]:
    """Submit a request for `tokens` tokens after `prompt[T]`; their ids, as they arrive."""
    request = Request(
        _prompt(model, prompt),
        sampling=SamplingParameters(temperature=temperature, seed=seed),
        max_tokens=tokens,
    )
    return _ids(model, model.submit(request))


def _prompt(model: ServedModel, tokens: npt.ArrayLike) -> Prompt:
    """A prompt of `tokens[T]`, after token 0 where a tokenizer may have no start token."""
    bundle = model.bundle
    start = 0 if bundle.manifest.HasField("tokenizer") else bundle.vocabulary
    return prompt_of(start, tokens, bundle.typecode)


def random_prompt(model: ServedModel, tokens: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Ids of `tokens` tokens of the model's vocabulary."""
    return np.random.default_rng(seed).integers(model.bundle.vocabulary, size=tokens)


class _Streams:
    """Streams of an engine, read to their end by asyncio as the servicer reads them."""

    def __init__(self, bundle: Bundle, setting: Setting) -> None:
        config = EngineConfig(
            slots=setting.streams, threads=setting.threads, provider=setting.device
        )
        self._streams = setting.streams
        self._temperature = 0.0 if setting.mode == "greedy" else 1.0
        self._model = ServedModel(bundle, config)
        saved = _made_up(bundle, setting.context)
        self._checkpoint = Checkpoint(self._model.no_checkpoint.generated, saved)

    @property
    def cache_bytes(self) -> int:
        """See Session."""
        return self._model.bundle.max_state_bytes

    def decode(self, steps: int) -> Window:
        """See Session. The window is the time in which every stream decodes."""
        return asyncio.run(self._decode(steps))

    async def _decode(self, steps: int) -> Window:
        epoch = time.perf_counter()
        prompt = _prompt(self._model, [])
        reads = []
        for seed in range(self._streams):
            sampling = SamplingParameters(self._temperature, seed=seed)
            request = Request(prompt, sampling, max_tokens=steps + 1)
            opened = self._model.open(Lease(str(seed), (request,)), [self._checkpoint])
            reads.append(_arrivals(_ids(self._model, opened), epoch))
        streams = await asyncio.gather(*reads)
        began = max(arrivals[0][0] for arrivals in streams)
        ended = min(arrivals[-1][0] for arrivals in streams)
        if began >= ended:  # so few steps that the reader gets them all at once
            began, ended = 0.0, max(arrivals[-1][0] for arrivals in streams)
        tokens = sum(n for arrivals in streams for at, n in arrivals if began < at <= ended)
        return Window(tokens, ended - began)

    def close(self) -> None:
        """See Session."""
        self._model.close()


class _Steps:
    """The same steps and folds, without scheduler, sampler or readers."""

    def __init__(self, bundle: Bundle, setting: Setting) -> None:
        self._bundle = bundle
        self._streams = setting.streams
        runtime = Runtime(bundle, setting.streams + 1, setting.threads, setting.device)
        self._cache = Cache(bundle, runtime, setting.streams)
        self._saved = _made_up(bundle, setting.context)

    @property
    def cache_bytes(self) -> int:
        """See Session."""
        return self._bundle.max_state_bytes

    def decode(self, steps: int) -> Window:
        """See Session."""
        self._cache.clear()
        for _ in range(self._streams):
            self._cache.restore(self._saved)
        tokens = np.zeros(self._streams, np.int64)
        began = time.perf_counter()
        for _ in range(steps):
            self._cache.step(tokens)
            self._cache.fold()
        return Window(steps * self._streams, time.perf_counter() - began)

    def close(self) -> None:
        """See Session."""


def _made_up(bundle: Bundle, context: int) -> SavedState:
    """The state that a prompt of `context` tokens would leave.

    Position, length and folds are those of a real one; only the content of the state is made up.
    """
    state: State = {}
    for tensor in bundle.state:
        shape = list(tensor.shape)
        if tensor.kind is StateKind.STACK:
            shape[1] = bundle.entries(context, tensor.kept)
        value = tensor.initial if tensor.kind is StateKind.RECURRENT else _FILLER
        state[tensor.name] = np.broadcast_to(np.asarray(value, tensor.element), shape)
    return SavedState(state, context)


async def _generate(model: ServedModel, prompt: int, seed: int) -> list[tuple[float, int]]:
    ids = random_prompt(model, prompt, seed)
    epoch = time.perf_counter()
    return await _arrivals(generate(model, ids, tokens=1), epoch)


async def _arrivals(
    stream: AsyncIterator[tuple[int, ...]], epoch: float
) -> list[tuple[float, int]]:
    """When tokens of a stream arrive, in seconds since `epoch`, and how many each time."""
    return [(time.perf_counter() - epoch, len(ids)) async for ids in stream]


async def _ids(model: ServedModel, session: Streams) -> AsyncIterator[tuple[int, ...]]:
    async for _, event in model.events(session):
        if isinstance(event, Delta) and event.tokens:
            yield event.tokens
        elif isinstance(event, Exception):
            raise event
