"""Layers that fold or drop old blocks: by definition, and as streams."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.layers.architecture import Architecture, Folding, LayerAttention, Rope, Summary
from model.layers.positions import RotaryPositions, turn
from model.patterns import make_pattern
from model.patterns.folded import Folded, Windowed
from model.patterns.pattern import Pattern
from tests import reference
from tests.checkpoints import FOLDED, folded_config
from tests.model.cases import Tokens, draw
from tests.model.streams import Streams, entries_after
from tests.model.test_streams import push_all

GROUPS, HEADS, DIM = 2, 6, 8
KEPT = [*itertools.product((0, 1), (0, 1, 2))]
KINDS: list[tuple[LayerAttention, Summary]] = [
    ("window", "max"),
    ("fold", "max"),
    ("fold", "tangent"),
    ("fold", "fitted"),
]
each_kept = pytest.mark.parametrize(("sink", "window"), KEPT)
each_kind = pytest.mark.parametrize(("kind", "summary"), KINDS)


def layer(
    kind: LayerAttention, summary: Summary, sink: int, window: int, span: int, length: int
) -> Pattern:
    """One layer in float64, beside others; what is fitted is random."""
    config = ModelConfig(
        7,
        context=max(span, length),
        width=HEADS * DIM,
        layers=2,
        heads=HEADS,
        span=span,
        attention="full",
        architecture=Architecture(
            kv_heads=GROUPS,
            rope=Rope((1.0, 0.3, 0.1)),  # the last two channels do not turn
            folding=Folding((kind, "fold"), sink, window, summary),
        ),
    )
    pattern = make_pattern(config, 0).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for weight in pattern.parameters():
        weight.add_(torch.randn(weight.shape, dtype=weight.dtype, generator=generator) / 3)
    return pattern


def tokens_of(length: int, seed: int = 0) -> Tokens:
    """Random tokens of one stream; keys and values have fewer heads. Half of q is negative."""
    drawn = draw(length, seed, heads=HEADS, dim=DIM)
    drawn.q[..., ::2] -= 3
    return Tokens(drawn.q, drawn.k[:, :GROUPS], drawn.v[:, :GROUPS], drawn.x)


def by_definition(pattern: Pattern, tokens: Tokens) -> torch.Tensor:
    """What tokens read, by loops: the group's mean weights, and the judging block's queries."""
    assert isinstance(pattern, Windowed)
    span, share = pattern.span, HEADS // GROUPS
    q = tokens.q[0].numpy()
    k, v = (np.repeat(y[0].numpy(), share, axis=0) for y in tokens[1:3])

    def summary(
        q: reference.Array, k: reference.Array, v: reference.Array, block: Any, reader: int
    ) -> tuple[reference.Array, reference.Array]:
        assert isinstance(pattern, Folded)
        judging = [token + pattern.window * span for token in block]
        assert max(judging) // span < reader // span  # known when the block leaves the window
        made_k, made_v = np.empty((HEADS, DIM)), np.empty((HEADS, DIM))
        for group in range(GROUPS):
            heads = [*range(group * share, (group + 1) * share)]
            keys, values = k[heads[0], block], v[heads[0], block]
            weights = np.mean([weigh(q[h, judging], keys, block, group) for h in heads], axis=0)
            made_k[heads], made_v[heads] = weights @ keys, weights @ values
            if pattern.summary == "max":
                made_k[heads] = keys.max(0)
            if pattern.summary == "fitted":
                made_k[heads] *= pattern.key_gain[group].numpy()
                made_v[heads] *= pattern.value_gain[group].numpy()
        return made_k, made_v

    def weigh(q: reference.Array, keys: reference.Array, block: Any, group: int) -> reference.Array:
        assert isinstance(pattern, Folded)
        logits = keys @ (q.max(0) if pattern.summary == "max" else q.mean(0))
        if pattern.summary == "fitted":
            logits = logits * pattern.sharpness[group].item()
            for place, token in enumerate(block):
                plain = unturned(keys[place], token)
                logits[place] += plain @ pattern.of_key[group, 0, :, 0].numpy()
                logits[place] += pattern.of_place[group, 0, place].item()
        weights = np.exp(logits - logits.max())
        return np.asarray(weights / weights.sum())

    supports = [pattern.support(position) for position in range(q.shape[1])]
    return torch.from_numpy(reference.attend(q, k, v, supports, summary))[None]


def unturned(key: reference.Array, position: int) -> reference.Array:
    """A key before its position turned its first six channels, in three pairs."""
    out = key.copy()
    for pair, frequency in enumerate((1.0, 0.3, 0.1)):
        angle = float(np.float32(position) * np.float32(frequency))
        back = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        out[[pair, pair + 3]] = back @ key[[pair, pair + 3]]
    return out


def test_a_key_is_turned_back_by_what_turned_it() -> None:
    key = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rope = RotaryPositions(Rope((1.0, 0.3, 0.1)))
    turned = turn(key[None, None, None], *rope(torch.tensor([[41]])))[0, 0, 0]
    np.testing.assert_allclose(unturned(turned.numpy(), 41), key.numpy(), atol=1e-6)


@each_kept
@each_kind
def test_the_parallel_form_is_the_definition(
    kind: LayerAttention, summary: Summary, sink: int, window: int
) -> None:
    length = 5 * (sink + window + 3) + 2
    pattern, tokens = layer(kind, summary, sink, window, 5, length), tokens_of(length)
    expected = by_definition(pattern, tokens)
    torch.testing.assert_close(pattern(*tokens), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("span", [5, 16, 32, 64])
@each_kept
@each_kind
def test_streams_are_the_parallel_form(
    kind: LayerAttention, summary: Summary, sink: int, window: int, span: int
) -> None:
    length = span * (sink + window + 4) + 3
    pattern, tokens = layer(kind, summary, sink, window, span, length), tokens_of(length)
    expected, rng = pattern(*tokens), random.Random(span)
    for most in (span, 1) if span == 5 else (span, 7):
        chunks = iter(lambda most=most: rng.randint(1, most), None)
        streams = Streams(pattern)
        got = push_all(streams, tokens, length, chunks)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
        left = {"window": 0, "fold": 1}[kind]
        blocks = length // span - sink - window
        assert entries_after(pattern, length) == length - blocks * (span - left)


def test_a_thousand_tokens_at_once_and_in_pieces() -> None:
    """Attention is computed for 256 tokens at a time; the border leaves no trace."""
    for span, window in ((32, 2), (96, 1)):
        pattern, tokens = layer("fold", "tangent", 1, window, span, 1000), tokens_of(1000)
        expected = pattern(*tokens)
        for length in (1, span, 255, 256, 257, 511, 600):
            got = pattern(*tokens.part(0, length))
            torch.testing.assert_close(got, expected[:, :, :length], rtol=0, atol=1e-9)


@each_kept
def test_the_schedule_counts_entries(sink: int, window: int) -> None:
    for kind in ("fold", "window"):
        pattern = layer(kind, "max", sink, window, 5, 64)
        schedule, kept = pattern.schedule, 1 if kind == "fold" else 0
        assert schedule is not None
        counts = [schedule.entries(pushed, kept) for pushed in range(65)]
        assert counts == [entries_after(pattern, pushed) for pushed in range(65)]
        most = max(counts[pushed] + 1 for pushed in range(64))
        assert {t.shape[1] for t in pattern.state() if t.kind == "stack"} == {most}
        assert schedule.entries(64, 5) == 64


def test_a_window_forgets_what_a_fold_remembers() -> None:
    changed, tokens = tokens_of(60), tokens_of(60)
    changed.v[:, :, 5:10] += 1  # a block behind the first one
    for kind, same in (("window", True), ("fold", False)):
        pattern = layer(kind, "tangent", 1, 1, 5, 60)
        before, after = pattern(*tokens)[:, :, -1], pattern(*changed)[:, :, -1]
        assert torch.equal(before, after) == same


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ("full", "full")}, "folding leaves every layer full"),
        ({"layers": ("full", "half")}, "folding of layer 1 must be one of full, fold, window"),
        ({"sink": -1}, "sink must be 0 blocks or more, got -1"),
        ({"window": -1}, "window must be 0 blocks or more, got -1"),
        ({"layers": ("full", "window"), "window": 0}, "window must be at least 1 block"),
        ({"summary": "mean"}, "summary must be one of max, tangent, fitted; got 'mean'"),
    ],
)
def test_impossible_foldings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Folding(("full", "fold")), **changes)


def test_a_folding_fits_its_model() -> None:
    config = folded_config(FOLDED["folded:tangent"])
    built = config.architecture
    for architecture, message in (
        (replace(built, folding=Folding(("fold", "full"))), "folding has 2 layers of 3"),
        (
            replace(built, windows=(4, 0, 0)),
            "layer 0 attends to the newest 4 tokens only, so that it cannot be fold: leave it full",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            replace(config, architecture=architecture)
    with pytest.raises(ValueError, match="context 7 is shorter than one block of 8 tokens"):
        replace(config, context=7)
    with pytest.raises(ValueError, match="folding needs full attention"):
        replace(
            config,
            attention="fixed",
            architecture=replace(built, rope=None, kv_heads=None),
        )


def test_a_config_comes_back_from_json() -> None:
    for folding in FOLDED.values():
        config = folded_config(folding)
        assert ModelConfig.read(json.loads(json.dumps(config.stored()))) == config
