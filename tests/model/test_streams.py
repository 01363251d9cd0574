"""Step and fold, token by token, give what the parallel forward gives, for every pattern."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from model.config import ROWS, Attention
from tests.model.cases import CAUSAL, DIM, HEADS, SPAN, Case, Tokens, draw
from tests.model.streams import Streams, entries_after

LENGTH = 3 * SPAN + 2
every_case = pytest.mark.parametrize("case", CAUSAL, ids=str)
DECODABLE: list[Attention] = [case.attention for case in CAUSAL if case.pooling == "max"]


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def negative(length: int, rows: int = 1, heads: int = HEADS, seed: int = 0) -> Tokens:
    """Random tokens, half of whose query channels are negative throughout whole spans."""
    tokens = draw(length, seed, rows=rows, heads=heads)
    tokens.q[..., ::2] -= 4
    return tokens


def push_all(
    streams: Streams, tokens: Tokens, last: int, chunks: Iterator[int] | int = SPAN, row: int = 0
) -> Tensor:
    """Push up to token `last`, each time as much as `chunks` and the next fold allow: all read."""
    read = []
    while (done := streams.pushed[row]) < last:
        chunk = chunks if isinstance(chunks, int) else next(chunks)
        end = min(last, done + min(chunk, streams.room(row)))
        read.append(streams.push([row], *tokens.part(done, end, row)))
    return torch.cat(read, dim=2)


def assert_same_state(one: Streams, other: Streams, row: int = 0) -> None:
    expected = other.held(row)
    for name, got in one.held(row).items():  # summaries of an open row are not written yet: NaN
        torch.testing.assert_close(got, expected[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, SPAN])
@every_case
def test_every_chunking_equals_the_parallel_form(case: Case, chunk: int) -> None:
    pattern, tokens = case.make(LENGTH), negative(LENGTH)
    assert_close(push_all(Streams(pattern), tokens, LENGTH, chunk), pattern(*tokens))


@pytest.mark.parametrize("span", [2, 8])
@every_case
def test_random_chunks_equal_the_parallel_form(case: Case, span: int) -> None:
    length = 4 * span + 3
    pattern, tokens, rng = case.make(length, span), negative(length), random.Random(span)
    for _ in range(5):
        chunks = iter(lambda: rng.randint(1, span), None)
        assert_close(push_all(Streams(pattern), tokens, length, chunks), pattern(*tokens))


@every_case
def test_any_prefix_then_single_tokens(case: Case) -> None:
    pattern, tokens = case.make(LENGTH), negative(LENGTH)
    expected = pattern(*tokens)
    slow = Streams(pattern)
    for prefix in range(1, LENGTH):
        push_all(slow, tokens, prefix, 1)
        fast = Streams(pattern)
        push_all(fast, tokens, prefix)
        assert_same_state(fast, slow)
        assert_close(push_all(fast, tokens, LENGTH, 1), expected[:, :, prefix:])


@every_case
def test_streams_of_different_phases_share_a_batch(case: Case) -> None:
    begun = (1, SPAN - 1, SPAN, 2 * SPAN + 1)
    pattern, tokens = case.make(LENGTH), negative(LENGTH, rows=len(begun))
    streams, expected = Streams(pattern, len(begun)), pattern(*tokens)
    for row, first in enumerate(begun):
        push_all(streams, tokens, first, row=row)
    alive, folded_alone = [*range(len(begun))], 0
    while alive:
        at = [streams.pushed[row] for row in alive]
        before = copy.deepcopy(streams)
        q, k, v = (y[alive, :, at].unsqueeze(2) for y in tokens[:3])
        got = streams.push(alive, q, k, v, tokens.x[alive, at].unsqueeze(1))
        assert_close(got[:, :, 0], expected[alive, :, at])
        for row in {*range(len(begun))} - {*alive}:
            assert_same_state(streams, before, row)
        if pattern.schedule:
            folded_alone += sum(streams.pushed[r] % pattern.schedule.span == 0 for r in alive) == 1
        alive = [row for row in alive if streams.pushed[row] < LENGTH]
    assert folded_alone >= (3 if pattern.schedule else 0)


@pytest.mark.parametrize("parked_at", [1, SPAN - 1, SPAN, SPAN + 3, 2 * SPAN])
@every_case
def test_a_copy_continues_to_the_bit_and_may_diverge(case: Case, parked_at: int) -> None:
    pattern, tokens = case.make(LENGTH), negative(LENGTH)
    streams = Streams(pattern)
    push_all(streams, tokens, parked_at)
    parked = copy.deepcopy(streams)
    went_on = push_all(streams, tokens, LENGTH, 1)
    assert torch.equal(push_all(copy.deepcopy(parked), tokens, LENGTH, 1), went_on)

    other = tokens.part(0, parked_at).then(negative(LENGTH - parked_at, seed=1))
    diverged = push_all(parked, other, LENGTH, 1)
    assert_close(diverged, pattern(*other)[:, :, parked_at:])
    assert (diverged - went_on).abs().max() > 0.1


@pytest.mark.parametrize(
    "case",
    [  # two at a time is all that a binary counter takes
        pytest.param(case, marks=pytest.mark.slow)
        if case.attention.startswith("logsparse")
        else case
        for case in CAUSAL
    ],
    ids=str,
)
def test_thousands_of_tokens(case: Case) -> None:
    rng = random.Random(str(case))
    for length in rng.sample(range(4096, 4300), 3):
        pattern = case.make(length, 64, heads=1)
        tokens = negative(length, heads=1, seed=length)
        chunks = iter(lambda: rng.randint(1, 128), None)
        assert_close(push_all(Streams(pattern), tokens, length, chunks), pattern(*tokens))


HELD: dict[Attention, Callable[[int, int], int]] = {
    "full": lambda t, s: 2 * t,
    "fixed": lambda t, s: 2 * (t % s + t // s) + 1,
    "logsparse": lambda t, s: 3 * t.bit_count() + 2 * t,
    "logsparse-hierarchical": lambda t, s: 3 * t.bit_count(),
    "axial-rowmajor": lambda t, m: 2 * t + 2 * m,
    "axial-vertical": lambda t, m: 2 * t + 5 * m,
    "axial-horizontal": lambda t, m: 6 * t + m,
    "mixture": lambda t, m: 6 * t + 6 * m,
    "mixture-averaged": lambda t, m: 6 * t + 6 * m,
    "sparse-fixed": lambda t, s: 2 * (t % s + t // s),
    "sparse-strided": lambda t, s: 2 * t,
    "sparse-logsparse": lambda t, s: 2 * t,
    "sparse-axial": lambda t, m: 2 * t,
}
"""Vectors of all heads after t tokens."""


@every_case
def test_what_is_held_at_every_token(case: Case) -> None:
    streams, tokens = Streams(case.make(LENGTH)), negative(LENGTH)
    for pushed in range(1, LENGTH + 1):
        push_all(streams, tokens, pushed)
        numbers = sum(held.numel() for held in streams.held(0).values())
        assert numbers == HELD[case.attention](pushed, SPAN) * HEADS * DIM


PEAK: dict[Attention, int] = {
    "full": 2 * 3072,
    "fixed": 255,
    "logsparse": 2 * 3072 + 3 * 12,
    "logsparse-hierarchical": 3 * 12,
    "axial-rowmajor": 6336,
    "axial-vertical": 6624,
    "axial-horizontal": 6 * 3072 + 96,
    "mixture": 6 * 3072 + 6 * 96,
    "mixture-averaged": 6 * 3072 + 6 * 96,
    "sparse-fixed": 254,
    "sparse-strided": 2 * 3072,
    "sparse-logsparse": 2 * 3072,
    "sparse-axial": 2 * 3072,
}
"""Vectors for a CIFAR-10 picture in raster order, L = 3072, span 96."""


@pytest.mark.parametrize("attention", DECODABLE)
def test_what_is_reserved_for_a_picture(attention: Attention) -> None:
    tensors = Case(attention).make(3072, 96).state()
    assert sum(math.prod(tensor.shape) for tensor in tensors) == PEAK[attention] * HEADS * DIM


@pytest.mark.parametrize("span", [2, 5, 8])
@every_case
def test_stacks_are_as_long_as_needed(case: Case, span: int) -> None:
    for length in range(2, 6 * span):
        pattern = case.make(length, span)
        context = case.config(length, span).context
        needed = max(entries_after(pattern, pushed) + 1 for pushed in range(context))
        reserved = {tensor.shape[1] for tensor in pattern.state() if tensor.kind == "stack"}
        assert all(entries >= needed for entries in reserved)
        if context % span == 0 or "logsparse" in case.attention:
            assert reserved <= {needed}


@pytest.mark.parametrize("attention", [name for name in ROWS if name in DECODABLE])
def test_what_was_not_written_is_never_read(attention: Attention) -> None:
    """Lines of columns that nothing has been written to, and the queries of the last row."""
    pattern, tokens = Case(attention).make(LENGTH), negative(LENGTH)
    streams = Streams(pattern)
    once = [t.name for t in pattern.state() if t.kind == "recurrent" and t.initial == 0.0]
    for name in once:
        streams.state[name].fill_(math.nan)
    got = []
    for pushed in range(1, LENGTH + 1):
        got.append(push_all(streams, tokens, pushed))
        if pushed % SPAN == 0:
            for name in {"queries", "inputs"} & {*once}:
                streams.state[name].fill_(math.nan)
    assert_close(torch.cat(got, dim=2), pattern(*tokens))


def test_a_pattern_that_cannot_decode_says_so() -> None:
    with pytest.raises(ValueError, match="fixed-bidirectional attends to later tokens"):
        Case("fixed-bidirectional").make(LENGTH).state()
