"""Both patterns against their definition, and what the definition implies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.attention import attend, fixed_attention, full_attention, summarise
from tests import reference

SPANS = (2, 5, 8)
HEADS, DIM = 2, 4


def draw(
    length: int, seed: int = 0, scale: float = 1.0, dim: int = DIM
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[1, HEADS, length, dim]`; `scale` sharpens the softmax."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 1, HEADS, length, dim)
    q, k, v = torch.randn(shape, dtype=torch.float64, generator=generator)
    return q * scale, k, v


def by_definition(q: Tensor, k: Tensor, v: Tensor, span: int | None) -> Tensor:
    arrays = [x[0].numpy() for x in (q, k, v)]
    out = (
        reference.full_attention(*arrays)
        if span is None
        else reference.fixed_attention(*arrays, span)
    )
    return torch.from_numpy(out)[None]


def run(q: Tensor, k: Tensor, v: Tensor, span: int | None) -> Tensor:
    return full_attention(q, k, v) if span is None else fixed_attention(q, k, v, span)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max().item() <= tolerance


class Watch(TorchDispatchMode):
    """Records the size of every tensor that is made, and the element type of every softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.softmax_dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if "softmax" in func.name():
            self.softmax_dtypes.add(args[0].dtype)
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("span", SPANS)
def test_supports_partition_the_past(span: int) -> None:
    for position in range(4 * span):
        direct, blocks = reference.supports(position, span)
        assert sorted([*direct, *(j for block in blocks for j in block)]) == [*range(position + 1)]
        assert len(direct) + len(blocks) == position % span + 1 + position // span


@pytest.mark.parametrize("span", [*SPANS, None])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_every_length_equals_the_definition(span: int | None, scale: float) -> None:
    longest = 3 * (span or 8) + 2
    q, k, v = draw(longest, scale=scale)
    expected = by_definition(q, k, v, span)
    for length in range(1, longest + 1):
        got = run(q[:, :, :length], k[:, :, :length], v[:, :, :length], span)
        assert_close(got, expected[:, :, :length])


@pytest.mark.parametrize("span", SPANS)
def test_weights_cover_exactly_the_past(span: int) -> None:
    length = 3 * span + 1
    q, k, _ = draw(length, dim=length, scale=0.3)
    one_hot = torch.eye(length, dtype=torch.float64).expand(1, HEADS, -1, -1)
    weights = fixed_attention(q, k, one_hot, span)  # token j's share in what token i reads
    past = torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(weights > 0, past.expand_as(weights))
    assert_close(weights.sum(dim=-1), torch.ones(1, HEADS, length, dtype=torch.float64))


@pytest.mark.parametrize("span", [*SPANS, None])
def test_later_tokens_change_nothing(span: int | None) -> None:
    length = 3 * (span or 8) + 2
    q, k, v = draw(length)
    before = run(q, k, v, span)
    for first in range(1, length):
        noise = [x.clone() for x in (q, k, v)]
        for x, other in zip(noise, draw(length, seed=first), strict=True):
            x[:, :, first:] = 5 * other[:, :, first:]
        assert_close(run(*noise, span)[:, :, :first], before[:, :, :first], 1e-12)


@pytest.mark.parametrize("span", SPANS)
def test_padding_to_whole_blocks_changes_nothing(span: int) -> None:
    for length in range(1, 3 * span + 3):
        q, k, v = draw(length)
        missing = -length % span
        padded = [torch.nn.functional.pad(x, (0, 0, 0, missing), value=1e4) for x in (q, k, v)]
        got = fixed_attention(*padded, span)[:, :, :length]
        assert_close(got, fixed_attention(q, k, v, span), 1e-12)


def test_identical_tokens_are_returned_as_they_are() -> None:
    q, k, v = (x.expand(-1, -1, 26, -1) for x in draw(1))
    got = fixed_attention(q, k, v, 8)
    assert_close(got, v)
    assert_close(got, by_definition(q, k, v, 8))


def test_pooled_query_that_picks_one_token() -> None:
    q, k, v = draw(25)
    q, k = q.abs(), -k.abs()
    k[:, :, 3] = 40.0  # of the first block, the pooled query sees this token alone
    _, summary = summarise(q[:, :, :8].amax(dim=2), k[:, :, :8], v[:, :, :8])
    assert_close(summary, v[:, :, 3])
    assert_close(fixed_attention(q, k, v, 8), by_definition(q, k, v, 8))


def test_queries_that_are_negative_throughout_a_block() -> None:
    q, k, v = draw(26)
    q[..., ::2] -= 6.0
    assert (q[:, :, :8].amax(dim=2) < -1).any()
    assert_close(fixed_attention(q, k, v, 8), by_definition(q, k, v, 8))
    at_zero = summarise(q[:, :, :8].amax(dim=2).clamp(min=0), k[:, :, :8], v[:, :, :8])[1]
    _, summary = summarise(q[:, :, :8].amax(dim=2), k[:, :, :8], v[:, :, :8])
    assert (at_zero - summary).abs().max() > 0.1  # a maximum that starts at zero would show


@pytest.mark.parametrize("pattern", ["fixed", "fixed, one block", "summarise", "attend"])
def test_softmax_of_bfloat16_is_computed_in_float32(pattern: str) -> None:
    q, k, v = (x.bfloat16() for x in draw(26, scale=3.0))
    with Watch() as watch:
        if pattern == "summarise":
            got, _ = summarise(q.amax(dim=2), k, v)
        elif pattern == "attend":
            got = attend(q, k, v, torch.tensor([26]))
        else:
            got = fixed_attention(q, k, v, 8 if pattern == "fixed" else 32)
    assert watch.softmax_dtypes == {torch.float32}
    assert got.dtype == torch.bfloat16


def test_float64_stays_float64() -> None:
    with Watch() as watch:
        assert fixed_attention(*draw(26), 8).dtype == torch.float64
    assert watch.softmax_dtypes == {torch.float64}


def test_no_tensor_grows_with_the_square_of_the_length() -> None:
    length, span = 4096, 64
    q = torch.randn(1, 1, length, 8)
    with Watch() as watch:
        fixed_attention(q, q, q, span)
    scores = length * (span + length // span)
    assert scores // 2 < watch.largest <= scores


def test_attend_hides_newer_and_dead_entries() -> None:
    q, k, v = (x.repeat(2, 1, 1, 1) for x in draw(6))
    lengths = torch.tensor([6, 4])
    got = attend(q[:, :, -2:], k, v, lengths)
    for row, length in enumerate(lengths.tolist()):
        for index, seen in enumerate((length - 1, length)):
            query = q[row, :, 4 + index, None]  # [HEADS, 1, DIM]
            weights = torch.softmax(query @ k[row, :, :seen].transpose(-1, -2), dim=-1)
            assert_close(got[row, :, index, None], weights @ v[row, :, :seen])


def test_oracle_is_sensitive_to_the_span() -> None:
    q, k, v = (x[0].numpy() for x in draw(20))
    wide = reference.fixed_attention(q, k, v, 20)
    assert np.abs(wide - reference.full_attention(q, k, v)).max() < 1e-12
    assert np.abs(wide - reference.fixed_attention(q, k, v, 5)).max() > 0.1
