from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from server.bundles.bundle import Bundle
from server.checkpoint import SavedState
from server.engine.kv_cache import Cache
from server.errors import BundleError
from server.runtime.host_state import StateLength
from server.runtime.onnx_session import Runtime

Logits = Callable[[list[int]], npt.NDArray[np.float64]]
SLOTS, TOLERANCE = 4, 1e-4
NUMPY = np.lib.tracemalloc_domain


@pytest.fixture
def runtime(bundle: Bundle) -> Runtime:
    """A runtime whose unused entries are NaN: a graph that reads one gives NaN."""
    runtime = Runtime(bundle, SLOTS + 1, threads=1)
    for tensor in bundle.manifest.state:
        if len(tensor.shape) == 3:
            runtime.rows.buffers[tensor.name].fill(np.nan)
    return runtime


def _tokens(bundle: Bundle, rng: np.random.Generator, length: int) -> list[int]:
    vocabulary = bundle.manifest.vocabulary
    start = vocabulary + int(rng.integers(1 + len(bundle.manifest.labels)))
    return [start, *rng.integers(vocabulary, size=length - 1).tolist()]


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_prefill_in_chunks_gives_the_logits_of_the_model(
    bundle: Bundle, runtime: Runtime, exact_logits: Callable[[Bundle], Logits], chunk: int
) -> None:
    tokens = _tokens(bundle, np.random.default_rng(chunk), bundle.context)
    cache = Cache(bundle, runtime, SLOTS)
    cache.start_prefill()
    got: list[npt.NDArray[np.float32]] = []
    while len(got) < len(tokens):
        part = tokens[len(got) :][: min(chunk, cache.block_room)]
        got += [row.copy() for row in cache.prefill(np.array(part), logits=True)]
    assert np.abs(np.array(got) - exact_logits(bundle)(tokens)).max() < TOLERANCE


def test_prefill_gives_logits_only_on_request(runtime: Runtime) -> None:
    assert runtime.prefill(0, np.array([1, 2]), 0, 0).shape[0] == 0


@pytest.mark.parametrize("seed", range(3))
def test_streams_that_come_and_go_get_the_logits_of_the_model(
    bundle: Bundle, runtime: Runtime, exact_logits: Callable[[Bundle], Logits], seed: int
) -> None:
    """Twelve streams pass through four slots: prefilled or not, parked, restored, and moved."""
    rng = np.random.default_rng(seed)
    model = exact_logits(bundle)
    cache = Cache(bundle, runtime, SLOTS)
    prompts = [_tokens(bundle, rng, int(rng.integers(9, bundle.context + 1))) for _ in range(12)]
    expected = [model(tokens) for tokens in prompts]
    coming, rows, away = list(range(12)), list[int](), list[tuple[SavedState, int]]()

    def leave(row: int) -> None:
        moved = cache.leave(row)
        last = rows.pop()
        assert (moved is None) == (row == len(rows))
        if moved is not None:
            rows[row] = last

    while coming or rows or away:
        if away and cache.num_free and rng.random() < 0.3:
            saved, stream = away.pop(int(rng.integers(len(away))))
            cache.restore(saved)
            rows.append(stream)
        if coming and cache.num_free and rng.random() < 0.5:
            stream = coming.pop()
            if rng.random() < 0.3:
                cache.begin()
            else:
                cache.start_prefill()
                ahead = int(rng.integers(1, len(prompts[stream])))
                while cache.prefill_pushed < ahead:
                    at = cache.prefill_pushed
                    end = min(ahead, at + min(cache.block_room, int(rng.integers(1, 9))))
                    cache.prefill(np.array(prompts[stream][at:end]))
                cache.join()
            rows.append(stream)
        if not rows:
            continue
        if rng.random() < 0.15:
            row = int(rng.integers(len(rows)))
            away.append((cache.save(row), rows[row]))
            leave(row)
            continue
        seen = cache.pushed.tolist()
        logits = cache.step(np.array([prompts[s][n] for s, n in zip(rows, seen, strict=True)]))
        for row, (stream, n) in enumerate(zip(rows, seen, strict=True)):
            assert np.abs(logits[row] - expected[stream][n]).max() < TOLERANCE, (stream, n)
        ended = {row for row, s in enumerate(rows) if cache.pushed[row] == len(prompts[s])}
        cache.fold(ended)
        for row in sorted(ended, reverse=True):
            leave(row)


def test_state_read_and_written_is_the_same_state(bundle: Bundle, runtime: Runtime) -> None:
    runtime.reset(0)
    runtime.prefill(0, np.arange(5), 0, 0)
    far = StateLength(entries=5, tokens=5)
    state = runtime.read(0, far)
    runtime.write(3, far, state)
    again = runtime.read(3, far)
    assert all(np.array_equal(state[name], again[name]) for name in state)
    runtime.prefill(0, np.arange(2), 5, 5)
    assert all(np.array_equal(state[name], again[name]) for name in state), "a copy, not a view"
    kept = sum(values.nbytes for values in state.values())
    assert kept == sum(bundle.state_bytes(5).values())


def test_buffers_have_the_computed_size(bundle: Bundle) -> None:
    assert Runtime(bundle, 3, threads=1).nbytes == 3 * bundle.max_state_bytes


def _step(runtime: Runtime, batch: int) -> npt.NDArray[np.float32]:
    """Logits of a first token for each of `batch` streams, before the next call."""
    for row in range(batch):
        runtime.reset(row)
    nothing = np.zeros(batch, np.int64)
    return runtime.step(np.arange(batch) % 16, nothing, nothing)


def test_batches_of_all_sizes_share_one_buffer_of_logits(bundle: Bundle) -> None:
    rows = 24
    runtime = Runtime(bundle, rows, threads=1)
    whole = _step(runtime, rows)
    assert len({_step(runtime, batch).ctypes.data for batch in range(1, rows)}) == 1
    assert np.shares_memory(whole, runtime.prefill(3, np.arange(5), 0, 0, logits=True))


def test_logits_take_the_memory_of_the_largest_batch(bundle: Bundle) -> None:
    rows, vocabulary = 24, bundle.vocabulary
    runtime = Runtime(bundle, rows, threads=1)
    for batch in range(1, rows + 1):  # everything but the logits has its memory now
        _step(runtime, batch)
    tracemalloc.start()
    try:
        again = Runtime(bundle, rows, threads=1)
        for batch in range(1, rows + 1):
            _step(again, batch)
        arrays = tracemalloc.take_snapshot().filter_traces([tracemalloc.DomainFilter(True, NUMPY)])
    finally:
        tracemalloc.stop()
    held = sum(trace.size for trace in arrays.traces)
    inputs = 8 * 5 * rows * rows  # tokens, positions, lengths and rows of each size
    assert held <= again.nbytes + 4 * vocabulary * rows + inputs


def test_logits_do_not_depend_on_the_sizes_before(bundle: Bundle) -> None:
    """Also after the buffer has grown, for a chunk of more tokens than there are streams."""
    runtime, chunk = Runtime(bundle, 5, threads=1), np.arange(7)
    for batch in (5, 1, 4, 2, 5, 3):
        fresh = Runtime(bundle, 5, threads=1)
        assert np.array_equal(_step(runtime, batch), _step(fresh, batch))
        runtime.reset(4)
        expected = fresh.prefill(4, chunk, 0, 0, logits=True).copy()
        assert np.array_equal(runtime.prefill(4, chunk, 0, 0, logits=True), expected)
        assert np.array_equal(_step(runtime, batch), _step(fresh, batch))


@pytest.mark.parametrize("name", ["step.onnx", "fold.onnx"])
def test_an_invalid_graph_is_refused_by_name(text: Bundle, tmp_path: Path, name: str) -> None:
    for path in text.folder.iterdir():
        content = b"no graph" if path.name == name else path.read_bytes()
        (tmp_path / path.name).write_bytes(content)
    with pytest.raises(BundleError, match=name):
        Runtime(replace(text, folder=tmp_path), 1)
