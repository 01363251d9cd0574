from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server import sampler
from server.sampler import (
    SamplingBatch,
    SamplingParameters,
    philox,
    sample,
    surprisal,
    uniform,
)

U64 = (1 << 64) - 1


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # The known-answer vectors of Random123, philox4x32 with 10 rounds.
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_gives_the_known_answers(counter: str, key: str, expected: str) -> None:
    def words(text: str) -> list[np.ndarray]:
        return [np.array([int(word, 16)], np.uint64) for word in text.split()]

    c0, c1, c2, c3 = words(counter)
    k0, k1 = words(key)
    assert [int(w[0]) for w in philox((c0, c1, c2, c3), (k0, k1))] == [
        int(w[0]) for w in words(expected)
    ]


def test_uniform_takes_its_bits_from_philox() -> None:
    """Seed is the key; the counter is the position and the output: resumable from these alone."""
    seed, position, output = 0x0123456789ABCDEF, (5 << 32) + 7, 3
    counter = tuple(np.array([word], np.uint64) for word in (7, 5, output, 0))
    key = tuple(np.array([word], np.uint64) for word in (0x89ABCDEF, 0x01234567))
    first, second, _, _ = philox(counter, key)  # type: ignore[arg-type]
    bits = (int(first[0]) << 32 | int(second[0])) >> 11
    drawn = uniform(np.array([seed], np.uint64), np.array([position]), output)
    assert drawn.tolist() == [bits / 2**53]


def test_uniform_is_even_and_below_one() -> None:
    numbers = uniform(np.full(100_000, 11, np.uint64), np.arange(100_000))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, 64, (0, 1))[0]
    assert _chi_square(counts, np.full(64, 1 / 64)) < _critical(63)
    lowest_bits = (numbers * 2**53).astype(np.uint64) & np.uint64(1)
    assert abs(lowest_bits.mean() - 0.5) < 0.01


def test_uniform_of_other_seeds_positions_and_outputs_is_unrelated() -> None:
    positions = np.arange(20_000)
    seeds = [0, 1, 2, 1 << 32, U64]
    runs = [uniform(np.full(20_000, seed, np.uint64), positions) for seed in seeds]
    runs.append(uniform(np.full(20_000, 0, np.uint64), positions, output=1))
    runs.append(uniform(np.full(20_000, 0, np.uint64), positions + (1 << 32)))
    related = np.abs(np.corrcoef(runs) - np.eye(len(runs)))
    assert related.max() < 0.04
    assert abs(np.corrcoef(runs[0][:-1], runs[0][1:])[0, 1]) < 0.04
    by_seed = uniform(np.arange(20_000, dtype=np.uint64), np.zeros(20_000, np.int64))
    assert abs(np.corrcoef(by_seed[:-1], by_seed[1:])[0, 1]) < 0.04


SETTINGS = [
    SamplingParameters(temperature, top_k, top_p, min_p, seed=99)
    for temperature, top_k, top_p, min_p in product(
        (0.5, 1.0, 2.0), (0, 1, 4, 100), (1.0, 0.6), (0.0, 0.2)
    )
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_tokens_are_drawn_as_often_as_they_should_be(parameters: SamplingParameters) -> None:
    logits = np.array([0.1, 2.0, -1.0, 1.5, 1.5, -4.0, 0.0, 1.0, -0.5, 2.2, -9.0, 0.7], np.float32)
    expected = _probabilities(logits.tolist(), parameters)
    count = 4000
    tokens = sample(
        np.tile(logits, (count, 1)), SamplingBatch.of([parameters] * count), np.arange(count)
    )
    counts = np.bincount(tokens, minlength=len(logits))
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert _chi_square(counts[possible], expected[possible]) < _critical(possible.sum() - 1)


def test_the_drawn_token_is_where_the_number_falls() -> None:
    """The seed alone decides: pinned, since stored seeds must give the same stream for ever."""
    weights = np.array([0.125, 0.0, 0.5, 0.25, 0.125])
    with np.errstate(divide="ignore"):
        logits = np.log(weights).astype(np.float32)
    seeds = np.arange(200, dtype=np.uint64)
    numbers = uniform(seeds, np.full(200, 5))
    expected = np.searchsorted(weights.cumsum(), numbers, side="right")
    batch = SamplingBatch.of([SamplingParameters(seed=seed) for seed in range(200)])
    assert sample(np.tile(logits, (200, 1)), batch, np.full(200, 5)).tolist() == expected.tolist()


@pytest.mark.parametrize(("number", "expected"), [(0.0, 1), (1 - 2**-53, 3)])
def test_the_outermost_numbers_fall_on_tokens_that_can_be(
    monkeypatch: pytest.MonkeyPatch, number: float, expected: int
) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda *_: np.array([number]))
    assert _one([0, 2, 2, 2, 0], SamplingParameters(top_k=3)) == expected


def _one(logits: list[float], parameters: SamplingParameters, position: int = 0) -> int:
    row = np.array([logits], np.float32)
    return int(sample(row, SamplingBatch.of([parameters]), np.array([position]))[0])


def _drawn(logits: list[float], parameters: SamplingParameters) -> set[int]:
    return {_one(logits, parameters, position) for position in range(200)}


def test_temperature_0_takes_the_likeliest_token() -> None:
    assert _drawn([0, 3, 1, 3], SamplingParameters(temperature=0)) == {1}


def test_a_low_temperature_does_not_overflow() -> None:
    assert _drawn([-300, 0, 300], SamplingParameters(temperature=1e-45)) == {2}


def test_a_high_temperature_makes_all_alike() -> None:
    assert _drawn([-300, 0, 300], SamplingParameters(temperature=3e38)) == {0, 1, 2}


@pytest.mark.parametrize(
    "parameters",
    [SamplingParameters(top_k=1), SamplingParameters(top_p=0.3), SamplingParameters(min_p=1)],
    ids=str,
)
def test_ties_at_the_border_are_kept(parameters: SamplingParameters) -> None:
    assert _drawn([2, 0, 2, 2, 1], parameters) == {0, 2, 3}


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    for top_k in (5, 6, (1 << 32) - 1):
        assert _drawn([0, 0, 0, 0, 0], SamplingParameters(top_k=top_k)) == set(range(5))


def test_a_tiny_top_p_keeps_the_likeliest() -> None:
    assert _drawn([0, 0.01, 0], SamplingParameters(top_p=1e-45)) == {1}


def test_a_top_p_just_below_1_may_keep_all() -> None:
    assert _drawn([0] * 7, SamplingParameters(top_p=1 - 2**-53)) == set(range(7))


def test_top_p_counts_what_top_k_left() -> None:
    """0.4 + 0.3 reach 0.9 of what two tokens have, but not of what all have."""
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    assert _drawn(logits, SamplingParameters(top_p=0.75)) == {0, 1, 2}
    assert _drawn(logits, SamplingParameters(top_p=0.75, top_k=2)) == {0, 1}
    assert _drawn(logits, SamplingParameters(top_p=0.55, top_k=2)) == {0}


def test_top_p_is_reached_when_it_is_met_exactly() -> None:
    weights = np.array([[0.125, 0.5, 0.25, 0.125]])
    for top_p, floor in [(0.49, 0.5), (0.5, 0.5), (0.51, 0.25), (0.75, 0.25), (0.76, 0.125)]:
        assert sampler._floors(weights, np.array([0]), np.array([top_p])).tolist() == [floor]


Parameters = st.builds(
    SamplingParameters,
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 40, 300]),
    top_p=st.sampled_from([1e-6, 0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    seed=st.integers(0, U64),
)


@pytest.mark.parametrize("seed", range(40))
def test_a_row_does_not_notice_the_others(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [
        SamplingParameters(
            temperature=float(rng.choice([0, 0.1, 0.7, 1, 3])),
            top_k=int(rng.choice([0, 0, 1, 3, 40, 300])),
            top_p=float(rng.choice([1e-6, 0.5, 0.95, 1, 1])),
            min_p=float(rng.choice([0, 0, 0.05, 1])),
            seed=int(rng.integers(U64, dtype=np.uint64)),
        )
        for _ in range(12)
    ]
    logits = rng.normal(0, 3, (len(rows), 257)).astype(np.float32)
    positions = rng.integers(1 << 40, size=len(rows))
    together = sample(logits, SamplingBatch.of(rows), positions)
    alone = [
        sample(logits[row : row + 1], SamplingBatch.of([p]), positions[row : row + 1])[0]
        for row, p in enumerate(rows)
    ]
    assert together.tolist() == alone
    backwards = sample(logits[::-1].copy(), SamplingBatch.of(rows[::-1]), positions[::-1].copy())
    assert backwards[::-1].tolist() == alone


@settings(max_examples=100)
@given(st.lists(st.sampled_from([-5.0, -1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=9), Parameters)
def test_only_tokens_that_were_kept_are_drawn(
    logits: list[float], parameters: SamplingParameters
) -> None:
    kept = set(np.flatnonzero(_probabilities(logits, parameters)).tolist())
    assert {_one(logits, parameters, position) for position in range(20)} <= kept


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_leaves_the_others_alone(bad: float) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    batch = SamplingBatch.of([SamplingParameters(seed=seed, top_p=0.9) for seed in range(3)])
    expected = sample(logits, batch, np.arange(3))
    logits[1] = bad
    assert sample(logits, batch, np.arange(3))[[0, 2]].tolist() == expected[[0, 2]].tolist()


def test_surprisal_is_in_bits() -> None:
    logits = np.array([[0, 0, 0, 0], [1000, 0, 0, 0], [0, math.log(3), -1e9, -1e9]], np.float32)
    assert surprisal(logits, np.array([2, 0, 0])).tolist() == pytest.approx([2, 0, 2])


def _probabilities(logits: list[float], parameters: SamplingParameters) -> np.ndarray:
    """The definition, token by token."""
    if parameters.temperature == 0:
        likeliest = logits.index(max(logits))
        return np.array([float(token == likeliest) for token in range(len(logits))])
    top = max(logits)
    weights = [math.exp((logit - top) / parameters.temperature) for logit in logits]
    falling = sorted(weights, reverse=True)
    if 0 < parameters.top_k < len(falling):
        falling = [w for w in falling if w >= falling[parameters.top_k - 1]]
    floor = falling[-1]
    if parameters.top_p < 1:
        whole, reached = sum(falling), 0.0
        for weight in falling:
            floor = weight
            reached += weight
            if reached / whole >= parameters.top_p:
                break
    floor = max(floor, parameters.min_p * falling[0])
    kept = [weight if weight >= floor else 0.0 for weight in weights]
    return np.array(kept) / sum(kept)


def _chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    expected = expected * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def _critical(freedom: int) -> float:
    """Exceeded by chance once in a million times (Wilson and Hilferty)."""
    if freedom == 0:
        return 1e-9
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 4.75 * math.sqrt(spread)) ** 3
