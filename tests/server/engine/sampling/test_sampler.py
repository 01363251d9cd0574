from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from server.engine.sampling import sampler, whole_rows
from server.engine.sampling.logits_processors import PenaltyState
from server.engine.sampling.sampler import (
    NO_TOKEN_LEFT,
    RandomNumbers,
    SamplingBatch,
    philox,
    sample,
    uniform,
)
from server.request import LogitsProcessors, SamplingParameters, prompt_of
from tests.server.engine.sampling.plain_sampler import Ambiguous, distribution, draw

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


LOGITS = [0.1, 2.0, -1.0, 1.5, 1.5, -4.0, 0.0, 1.0, -0.5, 2.2, -9.0, 0.7]
PROMPT, OUTPUT = (1, 6, 6), (9, 3, 9, 0, 9)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, U64), st.integers(0, 127)), min_size=1, max_size=4),
    st.lists(st.integers(0, 1 << 33), min_size=1, max_size=20),
    st.integers(0, 200),
)
def test_numbers_made_ahead_are_the_same(
    rows: list[tuple[int, int]], jumps: list[int], steps: int
) -> None:
    """The positions of a batch may advance by any steps."""
    seed = np.array([seed for seed, _ in rows], np.uint64)
    output = np.array([output for _, output in rows], np.uint64)
    numbers, positions = RandomNumbers(seed, output), np.arange(len(rows))
    for jump in (*jumps, *[1] * steps):
        assert numbers.at(positions).tolist() == uniform(seed, positions, output).tolist()
        positions = (positions + jump) % (1 << 40)


SETTINGS = [
    *(
        SamplingParameters(temperature, top_k, top_p, min_p, seed=99)
        for temperature, top_k, top_p, min_p in product(
            (0.5, 1.0, 2.0), (0, 1, 4, 100), (1.0, 0.6), (0.0, 0.2)
        )
    ),
    *(SamplingParameters(typical_p=typical_p, seed=99) for typical_p in (0.1, 0.3, 0.6, 0.95)),
    SamplingParameters(temperature=0.7, top_k=8, top_p=0.9, min_p=0.1, typical_p=0.5, seed=99),
    SamplingParameters(output=5, seed=99),
    *(
        SamplingParameters(seed=99, processors=processors)
        for processors in (
            LogitsProcessors(bias=((1, -2.5), (10, 11.0))),
            LogitsProcessors(allowed=(2, 3, 9)),
            LogitsProcessors(bad_words=((4,), (9, 1), (0, 9, 9), (9, 0, 9, 3), (1, 6, 6, 9, 3))),
            LogitsProcessors(min_tokens=6, withheld=(1, 9)),
            LogitsProcessors(min_tokens=5, withheld=(1, 9)),
            LogitsProcessors(repetition_penalty=1.7),
            LogitsProcessors(repetition_penalty=0.6),
            LogitsProcessors(frequency_penalty=0.4),
            LogitsProcessors(frequency_penalty=-0.4),
            LogitsProcessors(presence_penalty=1.5),
            LogitsProcessors(
                bias=((9, 3.0), (0, -1.0)),
                allowed=(0, 1, 3, 4, 6, 9),
                bad_words=((9, 4),),
                min_tokens=9,
                withheld=(6,),
                repetition_penalty=1.3,
                frequency_penalty=0.2,
                presence_penalty=-0.7,
            ),
        )
    ),
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_tokens_are_drawn_as_often_as_they_should_be(parameters: SamplingParameters) -> None:
    expected = np.array(distribution(LOGITS, parameters, PROMPT, OUTPUT))
    count = 4000
    penalties = _penalties(parameters, len(LOGITS), PROMPT, OUTPUT)
    batch = SamplingBatch.of([parameters] * count, [penalties] * count)
    logits = np.tile(np.array(LOGITS, np.float32), (count, 1))
    if penalties is None:
        tokens = sample(logits, batch, np.arange(count))
    else:  # a position is that of a token: other numbers come from other seeds
        seeds = np.arange(count, dtype=np.uint64)
        position = len(PROMPT) + len(OUTPUT)
        numbers = RandomNumbers(seeds, np.zeros_like(seeds))
        tokens = sample(logits, replace(batch, numbers=numbers), np.full(count, position))
    counts = np.bincount(tokens, minlength=len(LOGITS))
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert _chi_square(counts[possible], expected[possible]) < _critical(possible.sum() - 1)


def _penalties(
    parameters: SamplingParameters,
    vocabulary: int,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
) -> PenaltyState | None:
    """Of a stream that has generated `output`, token by token."""
    if parameters.processors is None:
        return None
    penalties = PenaltyState.of(
        parameters.processors, prompt_of(vocabulary, [*prompt], "H"), vocabulary
    )
    for token in output:
        SamplingBatch.of([parameters], [penalties]).remember(np.array([token]))
    return penalties


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
    [
        SamplingParameters(top_k=1),
        SamplingParameters(top_p=0.3),
        SamplingParameters(min_p=1),
        SamplingParameters(typical_p=0.3),
    ],
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
        assert whole_rows.floors(weights, np.array([0]), np.array([top_p])).tolist() == [floor]


Parameters = st.builds(
    SamplingParameters,
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 40, 300]),
    top_p=st.sampled_from([1e-6, 0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    typical_p=st.sampled_from([1e-6, 0.2, 0.7, 1.0, 1.0]),
    seed=st.integers(0, U64),
)


@pytest.mark.parametrize("seed", range(40))
def test_a_row_is_independent_of_the_others(seed: int) -> None:
    rng = np.random.default_rng(seed)
    processors = LogitsProcessors(
        bias=((3, 2.0),), bad_words=((7,), (8, 9)), repetition_penalty=1.2, presence_penalty=0.3
    )
    rows = [
        SamplingParameters(
            temperature=float(rng.choice([0, 0.1, 0.7, 1, 3])),
            top_k=int(rng.choice([0, 0, 1, 3, 40, 300])),
            top_p=float(rng.choice([1e-6, 0.5, 0.95, 1, 1])),
            min_p=float(rng.choice([0, 0, 0.05, 1])),
            typical_p=float(rng.choice([0.2, 0.9, 1, 1, 1])),
            output=int(rng.integers(3)),
            processors=processors if rng.random() < 0.5 else None,
            seed=int(rng.integers(U64, dtype=np.uint64)),
        )
        for _ in range(12)
    ]
    logits = rng.normal(0, 3, (len(rows), 257)).astype(np.float32)
    positions = rng.integers(1 << 40, size=len(rows))
    states = [_penalties(p, 257, range(50), range(7, 9)) for p in rows]
    together = sample(logits, SamplingBatch.of(rows, states), positions)
    alone = [
        sample(logits[row : row + 1], SamplingBatch.of([p], [m]), positions[row : row + 1])[0]
        for row, (p, m) in enumerate(zip(rows, states, strict=True))
    ]
    assert together.tolist() == alone
    backwards = sample(
        logits[::-1].copy(), SamplingBatch.of(rows[::-1], states[::-1]), positions[::-1].copy()
    )
    assert backwards[::-1].tolist() == alone


@settings(max_examples=100)
@given(st.lists(st.sampled_from([-5.0, -1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=9), Parameters)
def test_only_tokens_that_were_kept_are_drawn(
    logits: list[float], parameters: SamplingParameters
) -> None:
    try:
        kept = set(np.flatnonzero(distribution(logits, parameters)).tolist())
    except Ambiguous:
        reject()
    assert {_one(logits, parameters, position) for position in range(20)} <= kept


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_leaves_the_others_alone(bad: float) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    batch = SamplingBatch.of([SamplingParameters(seed=seed, top_p=0.9) for seed in range(3)])
    expected = sample(logits, batch, np.arange(3))
    logits[1] = bad
    assert sample(logits, batch, np.arange(3))[[0, 2]].tolist() == expected[[0, 2]].tolist()


def test_an_unlikely_token_can_be_more_typical_than_the_likeliest() -> None:
    """0.6 surprises by 0.51 nats, 0.1 by 2.3; the entropy is 1.23 nats."""
    logits = np.log([0.6, 0.1, 0.1, 0.1, 0.1]).tolist()
    assert _drawn(logits, SamplingParameters(typical_p=0.5)) == {0}
    assert _drawn(logits, SamplingParameters(typical_p=0.61)) == {0, 1, 2, 3, 4}
    logits = np.log([0.8, *[0.02] * 10]).tolist()
    assert _drawn(logits, SamplingParameters(typical_p=0.5)) == {0}
    logits = np.log([0.3, *[0.05] * 14]).tolist()  # 1.2 and 3.0, the entropy is 2.46
    assert _drawn(logits, SamplingParameters(typical_p=0.5)) == set(range(1, 15))


def test_without_an_allowed_token_none_is_drawn() -> None:
    nothing = LogitsProcessors(allowed=(1, 2), bad_words=((1,), (2,)))
    for temperature in (0.0, 1.0):
        parameters = [
            SamplingParameters(temperature, processors=r) for r in (nothing, LogitsProcessors())
        ]
        batch = SamplingBatch.of(parameters, [_penalties(p, 4) for p in parameters])
        tokens = sample(np.zeros((2, 4), np.float32), batch, np.zeros(2, np.int64))
        assert tokens[0] == NO_TOKEN_LEFT
        assert tokens[1] >= 0


# ---- whole streams, with every option at once

VOCABULARY = 7
Token = st.integers(0, VOCABULARY - 1)
Word = st.lists(Token, min_size=1, max_size=3).map(tuple)
Rules = st.builds(
    LogitsProcessors,
    bias=st.dictionaries(Token, st.sampled_from([-100.0, -1.0, 2.5])).map(lambda d: (*d.items(),)),
    allowed=st.one_of(st.just(()), st.sets(Token, min_size=3).map(tuple)),
    bad_words=st.lists(Word, max_size=3).map(tuple),
    min_tokens=st.integers(0, 6),
    withheld=st.sets(Token, max_size=2).map(tuple),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.0, 1.3]),
    frequency_penalty=st.sampled_from([-0.5, 0.0, 0.0, 0.7]),
    presence_penalty=st.sampled_from([-2.0, 0.0, 0.0, 1.1]),
)
Whole = st.builds(
    SamplingParameters,
    temperature=st.sampled_from([0.0, 0.6, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 2, 5]),
    top_p=st.sampled_from([1.0, 1.0, 0.83, 0.41]),
    min_p=st.sampled_from([0.0, 0.0, 0.113]),
    typical_p=st.sampled_from([1.0, 1.0, 0.77, 0.38]),
    seed=st.integers(0, U64),
    output=st.integers(0, 3),
    processors=st.one_of(st.none(), Rules),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(Whole, st.lists(Token, max_size=3)), min_size=1, max_size=4),
    st.integers(0, 1 << 32),
)
def test_streams_match_the_plain_sampler(
    streams: list[tuple[SamplingParameters, list[int]]], seed: int
) -> None:
    """Any options, in a batch that changes under way: each token is the one that the plain sampler
    draws, who looks at the whole stream every time."""
    rng = np.random.default_rng(seed)
    states = [_penalties(p, VOCABULARY, prompt) for p, prompt in streams]
    outputs: list[list[int]] = [[] for _ in streams]
    here = list(range(len(streams)))
    batch = None
    for _ in range(9):
        if batch is None or rng.random() < 0.3:  # streams leave and return
            here = rng.permutation(len(streams))[: rng.integers(1, len(streams) + 1)].tolist()
            batch = SamplingBatch.of([streams[i][0] for i in here], [states[i] for i in here])
        logits = rng.choice([-3, -1, 0, 0.5, 2, 3.25], (len(here), VOCABULARY)).astype(np.float32)
        before = logits.copy()
        positions = np.array([len(streams[i][1]) + len(outputs[i]) for i in here])
        tokens = sample(logits, batch, positions)
        batch.remember(tokens)
        assert (logits == before).all()
        for row, (i, token) in enumerate(zip(here, tokens.tolist(), strict=True)):
            parameters, prompt = streams[i]
            numbers = uniform(
                np.array([parameters.seed], np.uint64), positions[[row]], parameters.output
            )
            try:
                expected = distribution(logits[row].tolist(), parameters, prompt, outputs[i])
                wanted = draw(expected, float(numbers[0])) if expected else NO_TOKEN_LEFT
            except Ambiguous:
                reject()
            assert token == wanted
            outputs[i].append(token)
        if NO_TOKEN_LEFT in tokens:
            return  # such a stream ends


def _chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    expected = expected * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def _critical(freedom: int) -> float:
    """Exceeded by chance once in a million times (Wilson and Hilferty)."""
    if freedom == 0:
        return 1e-9
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 4.75 * math.sqrt(spread)) ** 3
