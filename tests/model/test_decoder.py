"""Tokens to logits: in parallel, as a stream, and by hand where the formula is short."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.decoder import Decoder
from tests.checkpoints import random_decoder
from tests.model.stack import Stack

LENGTH = 26


def config(**changes: Any) -> ModelConfig:
    settings: dict[str, Any] = {
        "vocabulary": 7,
        "context": LENGTH,
        "width": 16,
        "layers": 3,
        "heads": 2,
        "mlp": 24,
        "span": 8,
        "starts": 2,
    }
    return ModelConfig(**{**settings, **changes})


def draw_tokens(rows: int = 2) -> Tensor:
    tokens = torch.randint(7, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 7 + torch.arange(rows) % 2
    return tokens


def decode(model: Decoder, tokens: Tensor, chunk: int) -> Tensor:
    """Logits of every position, from stacks that see at most `chunk` tokens at a time."""
    shape = model.config
    span = shape.span if shape.attention == "fixed" else None
    stacks = [
        Stack(len(tokens), shape.heads, shape.head_dim, LENGTH, span) for _ in range(shape.layers)
    ]
    rows, logits, done = list(range(len(tokens))), [], 0
    while done < tokens.shape[1]:
        end = min(done + chunk, done + stacks[0].room(0), tokens.shape[1])
        positions = torch.arange(done, end).expand(len(rows), -1)
        x = model.embed_at(tokens[:, done:end], positions)
        for block, stack in zip(model.blocks, stacks, strict=True):
            x = block(x, lambda q, k, v, stack=stack: stack.push(rows, q, k, v))
        logits.append(model.head(model.norm(x)))
        done = end
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("attention", ["fixed", "full"])
@pytest.mark.parametrize("positions", ["factored", "sinusoid"])
@pytest.mark.parametrize("chunk", [1, 5])
@torch.no_grad()
def test_stream_equals_parallel(attention: Any, positions: Any, chunk: int) -> None:
    model = random_decoder(config(attention=attention, positions=positions)).double()
    tokens = draw_tokens()
    expected = model(tokens)
    assert expected.shape == (2, LENGTH, 7)
    torch.testing.assert_close(decode(model, tokens, chunk), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", ["fixed", "full"])
@torch.no_grad()
def test_every_earlier_token_matters_and_no_later_one(attention: Any) -> None:
    model = random_decoder(config(attention=attention)).double()
    tokens = draw_tokens(1)
    before = model(tokens)
    for changed in range(LENGTH):
        other = tokens.clone()
        other[0, changed] = (tokens[0, changed] + 1) % 7
        moved = (model(other) - before)[0].abs().amax(dim=-1)
        assert (moved[:changed] < 1e-12).all()
        assert (moved[changed:] > 1e-6).all()


@torch.no_grad()
def test_patterns_differ_only_after_the_first_block() -> None:
    fixed, full = (random_decoder(config(attention=name)).double() for name in ("fixed", "full"))
    full.load_state_dict(fixed.state_dict())
    difference = (fixed(draw_tokens()) - full(draw_tokens())).abs().amax(dim=(0, 2))
    assert difference[:8].max() < 1e-10
    assert difference[8:].min() > 1e-3


def test_refuses_more_tokens_than_the_context() -> None:
    with pytest.raises(ValueError, match="27 tokens exceed the context of 26"):
        Decoder(config())(torch.zeros(1, 27, dtype=torch.int64))


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

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
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
