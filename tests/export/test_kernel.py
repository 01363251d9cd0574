"""The attention kernel as it is exported: with int8 caches it rounds, and nothing else matters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from export.graph_file import trace_graph, write_graph
from export.kernel import group_query_attention
from model.attention import push_and_attend

HEADS, DIM, ENTRIES = 2, 64, 8192
UNITS = [torch.linspace(a, b, HEADS * DIM).view(HEADS, 1, DIM) / 127 for a, b in ((3, 4), (4, 2))]

Arrays = list[np.ndarray]


class Push(nn.Module):
    """The kernel alone."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        longest: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return group_query_attention(q, k, v, keys, values, lengths, longest, UNITS)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernel") / "kernel.onnx"
    batch, time = Dim("batch"), Dim("time")
    tokens = [torch.zeros(3, HEADS, 5, DIM) for _ in "qkv"]
    caches = [torch.zeros(3, HEADS, ENTRIES, DIM, dtype=torch.int8) for _ in "kv"]
    lengths = torch.full((3,), 5, dtype=torch.int32)
    names = ["q", "k", "v", "keys", "values", "lengths", "longest"]
    shapes = (*[{0: batch, 2: time}] * 3, *[{0: batch}] * 3, None)
    inputs = (*tokens, *caches, lengths, torch.tensor(5, dtype=torch.int32))
    proto, matrices = trace_graph(Push(), inputs, shapes, names, ["out", "next_k", "next_v"])
    write_graph(proto, path, matrices)
    return path


def run(graph: Path, inputs: Sequence[np.ndarray], lengths: Sequence[int], threads: int) -> Arrays:
    """Output and caches for q, k, v, keys, values; `lengths` are those after the push."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph, options)
    named = dict(zip(("q", "k", "v", "keys", "values"), inputs, strict=True))
    named["lengths"] = np.array(lengths, np.int32)
    named["longest"] = np.array(max(lengths), np.int32)
    outputs: Arrays = session.run(None, named)
    return outputs


def draw(batch: int, time: int) -> Arrays:
    rng = np.random.default_rng(batch)
    tokens = [rng.standard_normal((batch, HEADS, time, DIM), np.float32) for _ in "qkv"]
    shape = (batch, HEADS, ENTRIES, DIM)
    return [*tokens, *(rng.integers(-127, 128, shape, dtype=np.int8) for _ in "kv")]


def test_it_attends_to_what_it_rounds_and_stores(graph: Path) -> None:
    inputs, lengths = draw(4, 1), [7, 1, 90, 12]
    out, *caches = run(graph, inputs, lengths, 1)
    q, k, v, keys, values = (torch.from_numpy(x.astype(np.float64)) for x in inputs)
    k, v = ((x / u).round().clamp(-128, 127) * u for x, u in zip((k, v), UNITS, strict=True))
    keys, values = keys * UNITS[0], values * UNITS[1]
    expected, *stacks = push_and_attend(q, k, v, keys, values, torch.tensor(lengths))
    assert np.abs(out - expected.numpy()).max() < 1e-4
    for cache, stack, unit in zip(caches, stacks, UNITS, strict=True):
        for row, length in enumerate(lengths):
            stored = cache[row, :, :length] * unit.numpy()
            assert np.abs(stored - stack[row, :, :length].numpy()).max() < 1e-4


@pytest.mark.parametrize("time", [2, 3, 16])
def test_tokens_that_are_pushed_together_get_the_bits_of_tokens_alone(
    time: int, graph: Path
) -> None:
    inputs, begun = draw(1, time), 600
    together = run(graph, inputs, [begun + time], 1)
    out, caches = [], inputs[3:]
    for at in range(time):
        part = [x[:, :, at : at + 1] for x in inputs[:3]]
        one, *caches = run(graph, [*part, *caches], [begun + at + 1], 1)
        out.append(one)
    assert np.array_equal(np.concatenate(out, axis=2), together[0])
    for cache, other in zip(caches, together[1:], strict=True):
        assert np.array_equal(cache[:, :, : begun + time], other[:, :, : begun + time])


@pytest.mark.parametrize("threads", [1, 3, 12])
def test_threads_and_company_change_no_bit_of_a_long_stream(graph: Path, threads: int) -> None:
    """Without a sink, more threads than heads would share out the entries of one stream."""
    inputs = draw(3, 1)
    expected = run(graph, inputs, [ENTRIES, 40, ENTRIES - 3], 1)[0]
    for row, length in ((0, ENTRIES), (2, ENTRIES - 3)):
        alone = run(graph, [x[row : row + 1] for x in inputs], [length], threads)[0]
        assert np.array_equal(alone[0], expected[row])
    assert np.array_equal(run(graph, inputs, [ENTRIES, 40, ENTRIES - 3], threads)[0], expected)
