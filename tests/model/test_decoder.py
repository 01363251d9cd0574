"""Tokens to logits: in parallel, as a stream, and by hand where the formula is short."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.config import Attention, ModelConfig
from model.decoder import Decoder
from model.layers.architecture import OURS, Architecture, Rope
from model.patterns.pattern import Pattern
from tests.checkpoints import random_decoder
from tests.model.cases import CASES, CAUSAL, SPARSE, Case
from tests.model.streams import Streams

CONTEXT, LENGTH = 32, 26


def config(**changes: Any) -> ModelConfig:
    settings: dict[str, Any] = {
        "vocabulary": 7,
        "context": CONTEXT,
        "width": 16,
        "layers": 3,
        "heads": 2,
        "mlp": 24,
        "span": 8,
        "starts": 2,
    }
    return ModelConfig(**{**settings, **changes})


def make(case: Case, **changes: Any) -> Decoder:
    """Weights that patterns share are the same in all of them."""
    return random_decoder(config(attention=case.attention, pooling=case.pooling, **changes))


def draw_tokens(rows: int = 2) -> Tensor:
    tokens = torch.randint(7, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 7 + torch.arange(rows) % 2
    return tokens


def decode(model: Decoder, tokens: Tensor, chunk: int) -> Tensor:
    """Logits of every position, from streams that see at most `chunk` tokens at a time."""
    rows = [*range(len(tokens))]
    blocks: Any = model.blocks
    layers = [Streams(block.pattern, len(rows)) for block in blocks]
    logits, done = [], 0
    while done < tokens.shape[1]:
        end = min(done + chunk, done + layers[0].room(0), tokens.shape[1])
        positions = torch.arange(done, end).expand(len(rows), -1)
        remaining = iter(layers)

        def attend(
            pattern: Pattern, *given: Tensor, remaining: Iterator[Streams] = remaining
        ) -> Tensor:
            return next(remaining).push(rows, *given)

        x = model.embed_at(tokens[:, done:end], positions)
        turn = model.rotary.turn_at(positions) if model.rotary is not None else None
        for block in blocks:
            x = block(x, attend, turn)
        logits.append(model.head(model.norm(x)))
        done = end
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("case", CAUSAL, ids=str)
@pytest.mark.parametrize("positions", ["factored", "sinusoid"])
@pytest.mark.parametrize("chunk", [1, 5])
@torch.no_grad()
def test_stream_equals_parallel(case: Case, positions: Any, chunk: int) -> None:
    model = make(case, positions=positions).double()
    tokens = draw_tokens()
    expected = model(tokens)
    assert expected.shape == (2, LENGTH, 7)
    torch.testing.assert_close(decode(model, tokens, chunk), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_every_earlier_token_matters_and_no_later_one(case: Case) -> None:
    model = make(case).double()
    tokens = draw_tokens(1)
    before = model(tokens)
    for changed in range(LENGTH):
        other = tokens.clone()
        other[0, changed] = (tokens[0, changed] + 1) % 7
        moved = (model(other) - before)[0].abs().amax(dim=-1)
        if case not in CAUSAL:
            assert (moved > 1e-13).all()
            continue
        assert (moved[:changed] < 1e-14).all()
        assert moved[changed] > 1e-13
        if case not in SPARSE:
            assert (moved[changed:] > 1e-13).all()


UNLIKE_FULL: dict[Attention, int] = {
    "fixed": 8,
    "fixed-bidirectional": 0,
    "logsparse": 2,
    "logsparse-hierarchical": 2,
    "axial-rowmajor": 8,
    "axial-vertical": 16,  # in row 1 every other column is one token
    "axial-horizontal": 8,
    "mixture": 8,
    "mixture-averaged": 8,
    "sparse-fixed": 8,
    "sparse-strided": 9,
    "sparse-logsparse": 3,
    "sparse-axial": 8,
}
"""The first position that reads something else than under full attention."""


@pytest.mark.parametrize("attention", UNLIKE_FULL)
@torch.no_grad()
def test_a_pattern_differs_from_full_attention_where_it_should(attention: Attention) -> None:
    tokens, full = draw_tokens(), make(Case("full")).double()
    model = make(Case(attention)).double()
    model.load_state_dict(full.state_dict(), strict=False)
    difference = (model(tokens) - full(tokens)).abs().amax(dim=(0, 2))
    first = UNLIKE_FULL[attention]
    assert (difference[:first] < 1e-10).all()
    assert difference[first] > 1e-6


@torch.no_grad()
def test_all_patterns_and_poolings_are_different_functions() -> None:
    tokens, weights = draw_tokens(), make(Case("full")).state_dict()
    models = [make(case).double() for case in CASES]
    for model in models:
        model.load_state_dict(weights, strict=False)
    logits = [model(tokens)[:, -1] for model in models]
    for (one, a), (other, b) in itertools.combinations(zip(CASES, logits, strict=True), 2):
        assert (a - b).abs().max() > 1e-3, f"{one} and {other}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_weight_learns_under_bfloat16(case: Case) -> None:
    model = make(case).train()
    tokens = draw_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten() % 7).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and torch.isfinite(weight.grad).all(), name
        assert weight.grad.any(), name


def test_refuses_more_tokens_than_the_context() -> None:
    with pytest.raises(ValueError, match="33 tokens exceed the context of 32"):
        Decoder(config())(torch.zeros(1, 33, dtype=torch.int64))


def test_factored_positions_are_block_plus_offset() -> None:
    model = random_decoder(config())
    got = model.positions(torch.arange(LENGTH)[None])[0]
    weights = model.state_dict()
    for position in range(LENGTH):
        expected = (
            weights["positions.block.weight"][position // 8]
            + weights["positions.offset.weight"][position % 8]
        )
        assert torch.equal(got[position], expected)


def test_sinusoid_positions_are_all_sines_then_all_cosines() -> None:
    model = Decoder(config(positions="sinusoid", context=20_000))
    for position in (0, 1, 17, 19_999):
        got = model.embed_at(torch.tensor([[3]]), torch.tensor([[position]])) - model.embed(
            torch.tensor([[3]])
        )
        angles = [position * math.exp(-math.log(1e4) * t / 7) for t in range(8)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(got[0, 0], torch.tensor(expected), rtol=0, atol=1e-6)
        assert got.dtype == torch.float32


@torch.no_grad()
def test_scale_and_squared_relu_by_hand() -> None:
    """One layer, one token: attention returns its own value, whatever q and k are."""
    model = random_decoder(config(layers=1)).double()
    token = torch.tensor([[7]])
    block: Any = model.blocks[0]
    x = model.embed_at(token, torch.zeros(1, 1, dtype=torch.int64))
    _, _, v = block.qkv(block.norm_attention(x)).split(16, dim=-1)
    x = x + v @ block.out.weight.T
    x = x + (block.norm_mlp(x) @ block.up.weight.T).clamp(min=0) ** 2 @ block.down.weight.T
    expected = model.norm(x) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(token), expected, rtol=0, atol=1e-12)

    seen: list[Tensor] = []

    def attend(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        assert pattern is block.pattern
        torch.testing.assert_close(x, block.norm_attention(normed), rtol=0, atol=0)
        seen.append(q)
        return v

    normed = model.embed_at(token, torch.zeros(1, 1, dtype=torch.int64))
    block(normed, attend)
    unscaled = block.qkv(block.norm_attention(normed))[..., :16].view(1, 1, 2, 8).transpose(1, 2)
    torch.testing.assert_close(seen[0], unscaled / math.sqrt(8), rtol=0, atol=1e-12)


def test_a_fresh_decoder_adds_nothing_to_the_residual_stream() -> None:
    model = Decoder(config()).eval()
    tokens = draw_tokens()
    x = model.embed_at(tokens, torch.arange(LENGTH)[None])
    torch.testing.assert_close(model(tokens), model.head(model.norm(x)), rtol=0, atol=0)


def test_dropout_acts_in_training_alone() -> None:
    model = random_decoder(config())
    dropped = Decoder(config(), dropout=0.5)
    dropped.load_state_dict(model.state_dict())
    tokens = draw_tokens()
    assert not torch.equal(dropped.train()(tokens), model(tokens))
    assert torch.equal(dropped.eval()(tokens), model(tokens))


ROPE = Rope((1.0, 0.3, 0.1, 0.03))
BUILT = {
    "ours": OURS,
    "rms": Architecture(norm="rms"),
    "epsilon": Architecture(epsilon=0.1),
    "silu": Architecture(activation="silu"),
    "gated": Architecture(gated=True),
    "parallel": Architecture(parallel=True),
    "biases": Architecture(biases=("qkv", "out", "mlp", "head")),
    "no biases": Architecture(biases=()),
    "head norms": Architecture(head_norms=True),
    "shared heads": Architecture(kv_heads=1),
    "wide heads": Architecture(head_dim=24),
    "rope": Architecture(rope=ROPE),
    "rope of half a head": Architecture(rope=Rope(ROPE.frequencies[:2])),
    "rope in two layers": Architecture(rope=ROPE, unturned=(1,)),
    "windows": Architecture(windows=(3, 0, 9)),
    "llama": Architecture(
        kv_heads=1, norm="rms", activation="silu", gated=True, biases=(), rope=ROPE, tied=True
    ),
}


def build(name: str, **changes: Any) -> Decoder:
    built = BUILT[name]
    settings = {"attention": "full", "starts": 0 if built.tied else 2, "vocabulary": 9, **changes}
    return random_decoder(config(architecture=built, **settings)).double()


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("chunk", [1, 5])
@torch.no_grad()
def test_stream_equals_parallel_however_layers_are_built(name: str, chunk: int) -> None:
    model, tokens = build(name), draw_tokens()
    expected = model(tokens)
    torch.testing.assert_close(decode(model, tokens, chunk), expected, rtol=0, atol=1e-9)
    assert expected.abs().max() > 0.1


@torch.no_grad()
def test_every_architecture_is_another_function() -> None:
    tokens = draw_tokens()
    for (one, a), (other, b) in itertools.combinations(
        {name: build(name)(tokens)[:, -1] for name in BUILT}.items(), 2
    ):
        assert (a - b).abs().max() > 1e-3, f"{one} and {other}"


@torch.no_grad()
def test_a_window_hides_what_lies_behind_it() -> None:
    model = random_decoder(
        config(layers=1, attention="full", architecture=Architecture(windows=(4,)))
    )
    tokens = draw_tokens(1)
    other = tokens.clone()
    other[0, 10] = (tokens[0, 10] + 1) % 7
    moved = (model(tokens) - model(other))[0].abs().amax(dim=-1) > 1e-6
    assert moved.nonzero()[:, 0].tolist() == [10, 11, 12, 13]
    pattern: Any = model.blocks[0].pattern
    assert pattern.support(2).direct == (0, 1, 2)
    assert pattern.support(13).direct == (10, 11, 12, 13)


@torch.no_grad()
def test_queries_and_keys_are_turned_and_values_are_not() -> None:
    model = random_decoder(config(layers=1))
    block: Any = model.blocks[0]
    x, seen = torch.randn(1, 3, 16), []

    def attend(pattern: Pattern, *given: Tensor) -> Tensor:
        seen.append(given)
        return given[2]

    block(x, attend)
    block(x, attend, lambda y: 3 * y)
    plain, turned = seen
    for factor, one, other in zip((3, 3, 1, 1), plain, turned, strict=True):
        torch.testing.assert_close(other, factor * one)


@torch.no_grad()
def test_a_shared_head_is_that_of_its_neighbours() -> None:
    """Four heads of queries, two of keys and values: the first two read the first one."""
    shared = random_decoder(
        config(heads=4, width=32, attention="full", architecture=Architecture(kv_heads=2))
    ).double()
    own = Decoder(config(heads=4, width=32, attention="full")).double()
    weights = shared.state_dict()
    for layer in range(3):
        name = f"blocks.{layer}.qkv.weight"
        q, k, v = weights[name].split([32, 16, 16])
        k, v = (x.view(2, 1, 8, 32).expand(2, 2, 8, 32).reshape(32, 32) for x in (k, v))
        weights[name] = torch.cat((q, k, v))
    own.load_state_dict(weights)
    torch.testing.assert_close(own(draw_tokens()), shared(draw_tokens()), rtol=0, atol=1e-9)


@torch.no_grad()
def test_tied_logits_are_products_with_the_embeddings() -> None:
    model = build("llama")
    assert model.head.weight is model.embed.weight
    x = model.embed.weight[:2][None]
    torch.testing.assert_close(model.head(x)[0], x[0] @ model.embed.weight.T)


@torch.no_grad()
def test_learned_positions_are_added_and_none_are_not() -> None:
    tokens, at = torch.tensor([[3, 3]]), torch.tensor([[1, 5]])
    for positions, expected in (("learned", True), ("none", False)):
        model = random_decoder(config(positions=positions))
        added = (model.embed_at(tokens, at) - model.embed(tokens))[0]
        if expected:
            torch.testing.assert_close(added, model.positions.weight[at[0]], rtol=0, atol=1e-6)
        assert bool(added.any()) is expected
