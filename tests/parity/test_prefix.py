"""A prompt that begins like an earlier one copies its blocks, and gives the same logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from server.arrays import Ints
from tests.parity.served import Served, assert_parity, draw_tokens, expected_logits

SPAN, LENGTH = 8, 30


@pytest.fixture
def tokens(bundle: Path) -> Ints:
    """Two streams that differ from the middle of their third block on."""
    tokens = draw_tokens(bundle, 2, LENGTH)
    tokens[1, : 2 * SPAN + 3] = tokens[0, : 2 * SPAN + 3]
    tokens[1, 2 * SPAN + 3] = (tokens[0, 2 * SPAN + 3] + 1) % 7
    return tokens


def prompted(served: Served, prompt: Ints) -> int:
    """Give a prompt the prefill slot. Returns the number of tokens that need no push."""
    served.cache.start_prefill(prompt)
    served.prefilling = True
    served.poison()
    return served.cache.prefill_pushed


def test_a_hit_skips_blocks_and_changes_no_logit(bundle: Path, tokens: Ints) -> None:
    expected = expected_logits(bundle, tokens)
    served, alone = Served(bundle, prefix_bytes=10**6), Served(bundle)
    assert prompted(served, tokens[0]) == 0
    served.prefill(tokens[0])
    shares = served.bundle.shares_blocks
    fixed = ("fixed", "fixed-mean", "fixed-deepset-max", "sparse-fixed")
    assert shares == (bundle.name in fixed or bundle.name.startswith("folded-"))
    skipped = prompted(served, tokens[1])
    assert skipped == (2 * SPAN if shares else 0)
    assert prompted(alone, tokens[1]) == 0
    got = served.prefill(tokens[1, skipped:])
    assert_parity(got, expected[1, skipped:])
    assert np.array_equal(got, alone.prefill(tokens[1])[skipped:])
    states = [it.state(it.join()) for it in (served, alone)]
    for name, values in states[0].items():
        assert np.array_equal(values, states[1][name])


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_prefix_may_end_before_and_behind_a_fold(bundle: Path, blocks: int) -> None:
    """The longer prompt has folded blocks that are read as they are where the other one ends."""
    tokens = draw_tokens(bundle, 2, 4 * SPAN)
    tokens[1, : blocks * SPAN] = tokens[0, : blocks * SPAN]
    tokens[1, blocks * SPAN] = (tokens[0, blocks * SPAN] + 1) % 7
    served, alone = Served(bundle, prefix_bytes=10**6), Served(bundle)
    prompted(served, tokens[0])
    served.prefill(tokens[0])
    skipped = prompted(served, tokens[1])
    assert skipped == (blocks * SPAN if served.bundle.shares_blocks else 0)
    prompted(alone, tokens[1])
    got, expected = served.prefill(tokens[1, skipped:]), alone.prefill(tokens[1])
    assert_parity(got, expected_logits(bundle, tokens)[1, skipped:])
    assert np.array_equal(got, expected[skipped:])
    states = [it.state(it.join()) for it in (served, alone)]
    for name, values in states[0].items():
        if name in served.bundle.stacks:  # the next token sets the others
            assert np.array_equal(values, states[1][name])


def test_cached_blocks_are_copies(fixed_bundle: Path) -> None:
    tokens = draw_tokens(fixed_bundle, 1, LENGTH)
    served = Served(fixed_bundle, prefix_bytes=10**6)
    prompted(served, tokens[0])
    served.prefill(tokens[0])
    for buffer in served.runtime.rows.buffers.values():
        buffer.fill(np.nan)
    skipped = prompted(served, tokens[0])
    assert skipped == 3 * SPAN
    expected = expected_logits(fixed_bundle, tokens)[0]
    assert_parity(served.prefill(tokens[0, skipped:]), expected[skipped:])


def test_without_memory_nothing_is_cached(fixed_bundle: Path) -> None:
    tokens = draw_tokens(fixed_bundle, 1, LENGTH)
    served = Served(fixed_bundle)
    for _ in range(2):
        assert prompted(served, tokens[0]) == 0
        served.prefill(tokens[0])
    assert served.cache.prefix_bytes == 0
