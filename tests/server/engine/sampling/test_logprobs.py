from __future__ import annotations

import math

import numpy as np
import pytest

from server.engine.sampling.logprobs import surprisal, token_logprobs
from tests.server.engine.sampling import plain_sampler


def test_surprisal_is_in_bits() -> None:
    logits = np.array([[0, 0, 0, 0], [1000, 0, 0, 0], [0, math.log(3), -1e9, -1e9]], np.float32)
    assert surprisal(logits, np.array([2, 0, 0])).tolist() == pytest.approx([2, 0, 2])


def test_logprobs_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    logits = rng.choice([-30, -1, 0, 0.5, 2, 2.25, 80], (60, 9)).astype(np.float32)  # with ties
    tokens, top = rng.integers(9, size=60), rng.integers(0, 12, size=60).tolist()
    found = token_logprobs(logits, tokens, top)
    for row, token, count, one in zip(logits.tolist(), tokens.tolist(), top, found, strict=True):
        expected = plain_sampler.logprobs(row, token, count)
        assert one.top_ids == expected.top_ids
        assert one.logprob == pytest.approx(expected.logprob, abs=1e-9)
        assert one.top_logprobs == pytest.approx(expected.top_logprobs, abs=1e-9)


def test_rows_that_are_not_finite_leave_the_others_alone() -> None:
    logits = np.zeros((3, 4), np.float32)
    logits[0], logits[2] = np.nan, np.inf
    assert token_logprobs(logits, np.array([0, 1, 2]), [0, 0, 0])[1].logprob == -math.log(4)
