"""Push, attend, fold on an explicit stack gives what the parallel form gives."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from model.attention import fixed_attention
from tests.model.stack import Stack

HEADS, DIM, SPAN = 2, 4, 8
LENGTH = 3 * SPAN + 2

Triple = tuple[Tensor, Tensor, Tensor]


def draw(rows: int = 1) -> Triple:
    generator = torch.Generator().manual_seed(0)
    shape = (3, rows, HEADS, LENGTH, DIM)
    q, k, v = torch.randn(shape, dtype=torch.float64, generator=generator)
    q[..., ::2] -= 4  # whole blocks of negative queries
    return q, k, v


def part(qkv: Triple, first: int, last: int, row: int = 0) -> Triple:
    q, k, v = (x[row : row + 1, :, first:last] for x in qkv)
    return q, k, v


def new_stack(rows: int = 1) -> Stack:
    return Stack(rows, HEADS, DIM, LENGTH, SPAN)


def push_all(stack: Stack, qkv: Triple, last: int, chunk: int = SPAN, row: int = 0) -> Tensor:
    """Push up to token `last` in chunks of at most `chunk`; what each token read."""
    read = []
    while (done := int(stack.pushed[row])) < last:
        end = min(last, done + min(chunk, stack.room(row)))
        read.append(stack.push([row], *part(qkv, done, end, row)))
    return torch.cat(read, dim=2)


def assert_same_state(one: Stack, other: Stack, row: int = 0) -> None:
    for got, expected in zip(one.state(row), other.state(row), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 5, SPAN])
def test_every_position_equals_the_parallel_form(chunk: int) -> None:
    qkv = draw()
    got = push_all(new_stack(), qkv, LENGTH, chunk)
    torch.testing.assert_close(got, fixed_attention(*qkv, SPAN), rtol=0, atol=1e-12)


def test_any_prefix_then_single_tokens() -> None:
    qkv = draw()
    expected = fixed_attention(*qkv, SPAN)
    slow = new_stack()
    for prefix in range(1, LENGTH):
        push_all(slow, qkv, prefix, chunk=1)
        fast = new_stack()
        push_all(fast, qkv, prefix)
        assert_same_state(fast, slow)
        rest = push_all(fast, qkv, LENGTH, chunk=1)
        torch.testing.assert_close(rest, expected[:, :, prefix:], rtol=0, atol=1e-12)


def test_entries_are_the_closed_blocks_and_the_open_tokens() -> None:
    stack, qkv = new_stack(), draw()
    for pushed in range(1, LENGTH + 1):
        push_all(stack, qkv, pushed)
        keys, _, query_max = stack.state(0)
        assert keys.shape[1] == pushed // SPAN + pushed % SPAN
        assert torch.isfinite(query_max).all() == bool(pushed % SPAN)


def test_streams_of_different_phases_share_a_batch() -> None:
    rows = 4
    qkv = draw(rows)
    stack = new_stack(rows)
    for row, begun in enumerate((1, SPAN - 1, SPAN, 2 * SPAN + 1)):
        push_all(stack, qkv, begun, row=row)
    expected = fixed_attention(*qkv, SPAN)
    alive = list(range(rows))
    folded_alone = 0
    while alive:
        at = stack.pushed[alive]
        before = copy.deepcopy(stack)
        q, k, v = (x[alive, :, at][:, :, None] for x in qkv)
        got = stack.push(alive, q, k, v)
        torch.testing.assert_close(got[:, :, 0], expected[alive, :, at], rtol=0, atol=1e-12)
        folds = [row for row in alive if stack.pushed[row] % SPAN == 0]
        folded_alone += len(folds) == 1 and len(alive) > 1
        for row in set(range(rows)) - set(alive):
            assert_same_state(stack, before, row)
        alive = [row for row in alive if stack.pushed[row] < LENGTH]
    assert folded_alone >= 3


@pytest.mark.parametrize("parked_at", [1, SPAN - 1, SPAN, SPAN + 3, 2 * SPAN])
def test_a_copy_continues_to_the_bit_and_may_diverge(parked_at: int) -> None:
    qkv = draw(2)
    stack = new_stack()
    push_all(stack, qkv, parked_at)
    parked = copy.deepcopy(stack)
    went_on = push_all(stack, qkv, LENGTH, chunk=1)
    assert torch.equal(push_all(copy.deepcopy(parked), qkv, LENGTH, chunk=1), went_on)

    past, future = np.arange(LENGTH) < parked_at, 1
    q, k, v = (torch.where(torch.from_numpy(past)[:, None], x[0], x[future])[None] for x in qkv)
    diverged = push_all(parked, (q, k, v), LENGTH)
    expected = fixed_attention(q, k, v, SPAN)[:, :, parked_at:]
    torch.testing.assert_close(diverged, expected, rtol=0, atol=1e-12)
    assert (diverged - went_on).abs().max() > 0.1
