"""The parallel forward of every pattern against its definition, and what the definition implies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model.cases import (
    CASES,
    CAUSAL,
    HEADS,
    SPAN,
    Case,
    Tokens,
    before,
    by_definition,
    draw,
)

LENGTH = 3 * SPAN + 2
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_causal_case = pytest.mark.parametrize("case", CAUSAL, ids=str)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max().item() <= tolerance


def assert_defined(case: Case, tokens: Tokens) -> None:
    pattern = case.make(tokens.q.shape[2])
    assert_close(pattern(*tokens), by_definition(case, pattern, tokens))


class Watch(TorchDispatchMode):
    """Records the size of every tensor that is made, and the element type of every softmax."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0
        self.softmax_dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if "softmax" in func.name():
            self.softmax_dtypes.add(args[0].dtype)
        for made in out if isinstance(out, tuple) else (out,):
            if isinstance(made, Tensor):
                self.largest = max(self.largest, made.numel())
        return out


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("span", [2, 5, 8])
@every_case
def test_every_length_equals_the_definition(case: Case, span: int, scale: float) -> None:
    longest = 3 * span + 2
    pattern, tokens = case.make(longest, span), draw(longest, scale=scale)
    expected = by_definition(case, pattern, tokens)
    for length in range(1, longest + 1):
        some = tokens.part(0, length)
        if case not in CAUSAL:
            expected = by_definition(case, pattern, some)
        assert_close(pattern(*some), expected[:, :, :length])


@every_case
def test_queries_that_are_negative_throughout(case: Case) -> None:
    tokens = draw(LENGTH)
    tokens.q[..., ::2] -= 6.0
    assert tokens.q[..., ::2].max() < -1  # a maximum that starts at zero would show
    assert_defined(case, tokens)


@every_case
def test_identical_tokens_are_read_as_they_are(case: Case) -> None:
    q, k, v, x = draw(1)
    q, k, v = (y.expand(-1, -1, LENGTH, -1) for y in (q, k, v))
    tokens = Tokens(q, k, v, x.expand(-1, LENGTH, -1))
    assert_close(case.make(LENGTH)(*tokens), v)
    assert_defined(case, tokens)


@every_case
def test_pooled_query_that_picks_one_token(case: Case) -> None:
    q, k, v, x = draw(LENGTH)
    q, k = q.abs(), -k.abs()
    k[:, :, 3] = 40.0
    assert_defined(case, Tokens(q, k, v, x))


@every_case
def test_weights_cover_exactly_the_index_sets(case: Case) -> None:
    length = 24  # as wide as a head, so that every token's value can be a vector of its own
    tokens = draw(length, dim=length, scale=0.3)
    one_hot = torch.eye(length, dtype=torch.float64).expand(1, HEADS, -1, -1)
    pattern = case.make(length, 7, dim=length)
    weights = pattern(tokens.q, tokens.k, one_hot, tokens.x)  # token j's share in what i reads
    assert_close(weights.sum(dim=-1), torch.ones(1, HEADS, length, dtype=torch.float64))
    for position in range(length):
        support = before(length, pattern.support(position))
        seen = {*support.direct, *(token for span in support.spans for token in span)}
        for head in weights[0, :, position]:
            assert {*head.nonzero().flatten().tolist()} == seen
            assert (head >= 0).all()


@every_causal_case
def test_later_tokens_change_nothing(case: Case) -> None:
    pattern, tokens = case.make(LENGTH), draw(LENGTH)
    expected = pattern(*tokens)
    for first in range(1, LENGTH):
        noise = Tokens(*(5 * y for y in draw(LENGTH - first, seed=first)))
        got = pattern(*tokens.part(0, first).then(noise))
        assert_close(got[:, :, :first], expected[:, :, :first], 1e-12)
        assert ((got - expected)[:, :, first:].abs().amax(dim=-1) > 1e-3).all()


@every_causal_case
def test_padding_with_junk_changes_nothing(case: Case) -> None:
    junk = Tokens(*(torch.full_like(y, 1e4) for y in draw(SPAN)))
    for length in range(1, LENGTH):
        pattern, tokens = case.make(length + SPAN), draw(length)
        got = pattern(*tokens.then(junk))
        assert_close(got[:, :, :length], pattern(*tokens), 1e-12)


@every_case
def test_softmax_of_bfloat16_is_computed_in_float32(case: Case) -> None:
    tokens = Tokens(*(y.bfloat16() for y in draw(LENGTH, scale=3.0)))
    with Watch() as watch:
        got = case.make(LENGTH).bfloat16()(*tokens)
    assert watch.softmax_dtypes == (set() if case.attention == "full" else {torch.float32})
    assert got.dtype == torch.bfloat16


@every_case
def test_float64_stays_float64(case: Case) -> None:
    with Watch() as watch:
        assert case.make(LENGTH)(*draw(LENGTH)).dtype == torch.float64
    assert watch.softmax_dtypes <= {torch.float64}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tensors_are_made_where_the_tokens_are(case: Case) -> None:
    meta = torch.device("meta")  # any that is not the default one
    tokens = Tokens(*(y.to(meta) for y in draw(LENGTH)))
    assert case.make(LENGTH).to(meta)(*tokens).device == meta


@every_case
def test_no_tensor_grows_with_the_square_of_the_length(case: Case) -> None:
    """Training: forward and backward, at a length where the square is thirteen times the bound."""
    length, span, dim = 4096, 64, 8
    pattern = case.make(length, span, heads=1, dim=dim).float()
    tokens = Tokens(*(y.float().requires_grad_() for y in draw(length, heads=1, dim=dim)))
    with Watch() as watch:
        pattern(*tokens).sum().backward()
    assert watch.largest >= length * dim
    entries = 5 * span if case.attention != "full" else dim
    if "logsparse" in case.attention:
        entries = max(2 * dim, 1 + length.bit_length())
    assert watch.largest <= length * entries
    assert tokens.q.grad is not None and torch.isfinite(tokens.q.grad).all()
