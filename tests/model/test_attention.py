"""The kernels that the patterns share, each by itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.attention import (
    NEVER,
    attend,
    cumulative_max,
    expectation,
    in_blocks,
    push,
    push_and_attend,
    softmax,
)


def normals(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_softmax_is_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    assert softmax(normals(3, 4).to(dtype)).dtype == torch.float32
    assert softmax(normals(3, 4)).dtype == torch.float64


def test_expectation_is_attention_of_one_query() -> None:
    query, keys, values = normals(2, 3), normals(2, 5, 3, seed=1), normals(2, 5, 3, seed=2)
    for line in range(2):
        shares = [math.exp(query[line] @ key) for key in keys[line]]
        mixed = sum(s * value for s, value in zip(shares, values[line], strict=True)) / sum(shares)
        assert_close(expectation(query, keys, values)[line], torch.as_tensor(mixed))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 33])
def test_cumulative_max(length: int) -> None:
    x = normals(2, length, 3) - 5
    for row in range(length):
        assert torch.equal(cumulative_max(x)[:, row], x[:, : row + 1].amax(dim=1))


def test_blocks_are_padded_at_the_end() -> None:
    x = normals(1, 2, 7, 3)
    blocks = in_blocks(x, 3)
    assert blocks.shape == (1, 2, 3, 3, 3)
    assert torch.equal(blocks.flatten(2, 3)[:, :, :7], x)
    assert not blocks[:, :, 2, 1:].any()


def test_what_is_pushed_lands_behind_the_valid_entries() -> None:
    stack, new = normals(2, 3, 6, 4), normals(2, 3, 2, 4, seed=1)
    pushed = push(stack, new, torch.tensor([6, 3], dtype=torch.int32))
    assert torch.equal(pushed[0, :, 4:], new[0]) and torch.equal(pushed[0, :, :4], stack[0, :, :4])
    assert torch.equal(pushed[1, :, 1:3], new[1])
    assert torch.equal(pushed[1, :, [0, 3, 4, 5]], stack[1, :, [0, 3, 4, 5]])


def test_the_stack_hides_newer_and_dead_entries() -> None:
    q, k, v = (normals(2, 3, 2, 4, seed=seed) for seed in range(3))
    lengths = torch.tensor([6, 4])
    stacks = normals(2, 3, 6, 4, seed=3), normals(2, 3, 6, 4, seed=4)
    got, keys, values = push_and_attend(q, k, v, *stacks, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(keys[row, :, length - 2 : length], k[row])
        for index, seen in enumerate((length - 1, length)):
            read = expectation(q[row, :, index], keys[row, :, :seen], values[row, :, :seen])
            assert_close(got[row, :, index], read)


def test_lists_may_hold_anything_where_they_are_not_valid() -> None:
    q, keys, values = normals(1, 2, 3, 4), normals(1, 3, 5, 2, 4), normals(1, 3, 5, 2, 4, seed=1)
    valid = torch.tensor([[[1, 0, 1, 0, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]], dtype=torch.bool)
    keys[~valid], values[~valid] = math.nan, math.inf
    got = attend(q, keys, values, valid)
    for token in range(3):
        some = valid[0, token]
        for head in range(2):
            lists = (y[0, token, some, head] for y in (keys, values))
            assert_close(got[0, head, token], expectation(q[0, head, token], *lists))


def test_never_is_finite_in_what_stores_it() -> None:
    assert math.isfinite(NEVER) and torch.tensor(NEVER, dtype=torch.float32).isfinite()
    assert torch.maximum(torch.tensor(NEVER), torch.tensor(-1e30)) == -1e30
