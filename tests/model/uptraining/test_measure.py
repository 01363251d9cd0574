"""Losses by position and pass keys, as the parallel model has them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model.layers.architecture import Folding
from model.uptraining.measure import (
    DEPTHS,
    Keys,
    key_cases,
    keys_found,
    last_quarter,
    losses,
)
from tests.checkpoints import folded_config, random_decoder

MODEL = random_decoder(folded_config(Folding(("full", "fold", "window"), 1, 1, "fitted"), 600))


def by_letters(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int64) % 7


def test_losses_are_those_of_each_quarter() -> None:
    tokens = torch.randint(7, (3, 530), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = MODEL(tokens[:, :-1])
    each = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    found = losses(MODEL, tokens)
    ends = (0, 132, 264, 397, 529)
    expected = [float(each[:, a:b].mean()) for a, b in pairwise(ends)]
    assert found.length == 530
    assert found.parts == pytest.approx(expected, abs=1e-5)
    assert found.last_by_window == pytest.approx(each[:, 397:].mean(1).tolist(), abs=1e-5)
    assert found.mean == pytest.approx(sum(expected) / 4, abs=1e-5)


def test_a_difference_has_the_error_of_its_pairs() -> None:
    tokens = torch.randint(7, (4, 300), generator=torch.Generator().manual_seed(1))
    one = losses(MODEL, tokens)
    gain, error = last_quarter(one, one)
    assert (gain, error) == (0, 0)
    other = losses(MODEL, tokens.flip(1))
    gain, error = last_quarter(one, other)
    pairs = np.subtract(one.last_by_window, other.last_by_window)
    assert gain == pytest.approx(pairs.mean()) and error == pytest.approx(pairs.std(ddof=1) / 2)
    assert np.isnan(last_quarter(losses(MODEL, tokens[:1]), losses(MODEL, tokens[1:2]))[1])


def test_a_case_tells_a_key_early_and_asks_for_it_at_its_end() -> None:
    hay = torch.full((2, 300), 9)
    cases = key_cases(hay, by_letters, 11)
    assert cases[0].tokens.equal(key_cases(hay, by_letters, 11)[0].tokens)
    assert [case.depth for case in cases] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    for case in cases:
        tokens = case.tokens.tolist()
        assert len(tokens) == 300 and case.key == 5
        told, asked = (
            by_letters(text).tolist() for text in ("\nThe pass key is ", " pass key is ")
        )
        depth = tokens.index(told[0])
        assert tokens[depth : depth + len(told)] == told and tokens[:depth] == [9] * depth
        key = tokens[depth + len(told) :][:5]
        assert tokens[-5 - len(asked) :] == asked + key
        needle = (
            "\nThe pass key is 12345. Remember it.\n\nWhat is the pass key? The pass key is 12345"
        )
        assert depth == round(DEPTHS[case.depth] * (300 - len(needle)))


def test_a_digit_is_right_if_it_is_the_most_likely_one() -> None:
    hay = torch.randint(7, (8, 300), generator=torch.Generator().manual_seed(1))
    cases = key_cases(hay, by_letters, 9)
    right = [0] * 5
    with torch.no_grad():
        for number, case in enumerate(cases):
            chosen = MODEL(case.tokens[None])[0].argmax(-1)
            found = sum(int(chosen[n - 1]) == int(case.tokens[n]) for n in range(295, 300))
            right[number % 5] += found
    assert 0 < sum(right) < 45 and len({*right}) > 1
    shares = (*(n / 10 for n in right[:4]), right[4] / 5)
    assert keys_found(MODEL, cases) == Keys(300, sum(right) / 45, 9, shares)
    few = keys_found(MODEL, cases[:2])
    assert not np.isnan(few.by_depth[:2]).any() and np.isnan(few.by_depth[2:]).all()
