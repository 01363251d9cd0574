"""The sampler gives the tokens of the sampler before it, for the same seeds, whatever is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.arrays import Floats
from server.engine.sampling import estimates
from server.engine.sampling.logits_processors import PenaltyState
from server.engine.sampling.logprobs import surprisal, token_logprobs
from server.engine.sampling.sampler import SamplingBatch, sample
from server.request import LogitsProcessors, SamplingParameters, prompt_of
from tests.server.engine.sampling.old_sampler import OldPenalties, old_sample

U64 = (1 << 64) - 1
SIZES = (4096, 256, 1000, 151_936)

Temperatures = st.sampled_from([0.0, 1e-3, 0.3, 0.8, 1.0, 1.0, 1.7, 100.0])
Parameters = st.builds(
    SamplingParameters,
    temperature=Temperatures,
    top_k=st.sampled_from([0, 0, 0, 1, 2, 50, 700, 5000, 1 << 31]),
    top_p=st.sampled_from([1.0, 1.0, 1e-6, 0.3, 0.5, 0.95, 0.999, 1 - 2**-53]),
    min_p=st.sampled_from([0.0, 0.0, 0.0, 1e-9, 0.02, 0.5, 1.0]),
    typical_p=st.sampled_from([1.0, 1.0, 1.0, 1e-6, 0.2, 0.5, 0.9, 1 - 2**-53]),
    seed=st.integers(0, U64),
    output=st.integers(0, 127),
)
SHAPES = ("model", "flat", "equal", "steps", "two", "masked", "tiny", "far")


@lru_cache(maxsize=64)
def logits_of(shape: str, vocabulary: int, seed: int) -> Floats:
    """One row: as a model's, or with what is hard about rounding: ties, nothing, extremes."""
    rng = np.random.default_rng([seed, vocabulary, SHAPES.index(shape)])
    row = rng.normal(-4, 2.2, vocabulary)
    if shape in ("model", "masked"):
        row[rng.integers(vocabulary, size=60)] += 8 + rng.gumbel(0, 3, 60)
        row -= row[np.isfinite(row)].max() * (seed % 2)  # the largest may be 0
    if shape == "flat":
        row = rng.normal(0, 1, vocabulary)
    if shape == "equal":
        row = np.full(vocabulary, rng.choice([-3.0, 0.0, 7.5]))
    if shape == "steps":
        row = rng.integers(-6, 5, vocabulary) * rng.choice([0.25, 1.0, 3.0])
    if shape == "two":
        row = np.where(rng.random(vocabulary) < 0.5, 1.0, 1.0 + math.log(2))
    if shape == "masked":
        row[rng.random(vocabulary) < rng.choice([0.1, 0.9, 0.9999])] = -np.inf
        row[rng.integers(vocabulary)] = 1
    if shape == "tiny":
        row = rng.normal(0, 1, vocabulary) * (1e-9 if seed % 2 else 1e-19)
    if shape == "far":
        row = rng.normal(0, 3000, vocabulary)
    logits = row.astype(np.float32)
    logits.flags.writeable = False
    return logits


def _drawn(logits: Floats, parameters: SamplingParameters, positions: range) -> list[int]:
    batch = SamplingBatch.of([parameters] * len(positions))
    rows = np.broadcast_to(logits, (len(positions), len(logits)))
    return sample(rows, batch, np.array(positions)).tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocabulary", SIZES)
@settings(max_examples=20)
@given(Parameters, st.integers(0, 5))
def test_parameters(vocabulary: int, shape: str, parameters: SamplingParameters, seed: int) -> None:
    logits, positions = logits_of(shape, vocabulary, seed), range(40, 43)
    expected = [old_sample(logits, parameters, position) for position in positions]
    assert _drawn(logits, parameters, positions) == expected


@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("edge", [0.0, 0.25, 0.5, 0.75, 1 - 2**-53, 2**-53])
def test_numbers_on_the_border_of_a_token(
    vocabulary: int, edge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rounding decides, it decides as ever."""
    for module in ("server.engine.sampling.sampler", "tests.server.engine.sampling.old_sampler"):
        monkeypatch.setattr(f"{module}.uniform", lambda seed, *_: np.full(len(seed), edge))
    for shape in SHAPES:
        logits = logits_of(shape, vocabulary, 1)
        for top_p in (1.0, 0.5):
            parameters = SamplingParameters(top_p=top_p)
            assert _drawn(logits, parameters, range(1)) == [old_sample(logits, parameters, 0)]


def _some_tokens(vocabulary: int) -> st.SearchStrategy[int]:
    return st.integers(0, 20) | st.integers(0, vocabulary - 1)


@st.composite
def _requests(draw: st.DrawFn, vocabulary: int) -> tuple[SamplingParameters, list[int]]:
    """Parameters with processors, and a prompt."""
    token = _some_tokens(vocabulary)
    numbers = st.lists(token, max_size=6)
    processors = LogitsProcessors(
        bias=tuple(draw(st.dictionaries(token, st.floats(-100, 100), max_size=5)).items()),
        allowed=tuple(sorted({*draw(st.just([]) | st.lists(token, min_size=1, max_size=30))})),
        bad_words=tuple(map(tuple, draw(st.lists(st.lists(token, min_size=1, max_size=3))))),
        min_tokens=draw(st.integers(0, 5)),
        withheld=tuple({*draw(numbers)}),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.7, 1.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, -0.5, 1.5])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, -0.5, 1.5])),
    )
    parameters = draw(Parameters)
    return SamplingParameters(**{**vars(parameters), "processors": processors}), draw(numbers)


@pytest.mark.parametrize("vocabulary", SIZES)
@settings(max_examples=25)
@given(st.data())
def test_processors_step_by_step(vocabulary: int, data: st.DataObject) -> None:
    """Three streams, one without processors: the batch changes between steps."""
    asked = data.draw(st.lists(_requests(vocabulary), min_size=1, max_size=2))
    plain = data.draw(Parameters)
    parameters = [asked[0][0], plain, *(one for one, _ in asked[1:])]
    prompts = [asked[0][1], [], *(prompt for _, prompt in asked[1:])]
    old = [_old(one, prompt, vocabulary) for one, prompt in zip(parameters, prompts, strict=True)]
    new = [_new(one, prompt, vocabulary) for one, prompt in zip(parameters, prompts, strict=True)]
    shape, batch = data.draw(st.sampled_from(SHAPES)), None
    for step in range(7):
        if step == 5:  # another server takes the streams over
            new = [_new(*each, vocabulary) for each in zip(parameters, prompts, strict=True)]
            for penalties, before in zip(new, old, strict=True):
                if penalties is not None and before is not None:
                    penalties.recall(np.array(before.output, np.int64))
        if batch is None or step % 3 == 2:
            batch = SamplingBatch.of(parameters, new)
        logits = np.stack([logits_of(shape, vocabulary, step)] * len(parameters))
        positions = np.array([len(prompt) + step for prompt in prompts])
        tokens = sample(logits, batch, positions)
        for row, (one, penalties) in enumerate(zip(parameters, old, strict=True)):
            assert tokens[row] == old_sample(logits[row], one, int(positions[row]), penalties)
        if (tokens < 0).any():
            return
        if step < 4:  # the streams repeat themselves: words and counts grow
            tokens[:] = data.draw(st.integers(0, 20))
        batch.remember(tokens)
        for token, penalties in zip(tokens.tolist(), old, strict=True):
            if penalties is not None:
                penalties.remember(token)


def test_a_biased_token_is_repetitive_once_it_has_come() -> None:
    """It has an entry from the beginning, for its bias."""
    for vocabulary in SIZES:
        processors = LogitsProcessors(repetition_penalty=2.0, bias=((5, 1.0),))
        greedy = SamplingParameters(temperature=0.0, processors=processors)
        batch = SamplingBatch.of([greedy], [_new(greedy, [], vocabulary)])
        logits = np.zeros((1, vocabulary), np.float32)
        logits[0, 5:7] = 10.0, 8.0
        assert sample(logits, batch, np.array([0])).tolist() == [5]
        batch.remember(np.array([5]))
        assert sample(logits, batch, np.array([1])).tolist() == [6]


def test_tokens_are_withheld_from_the_stream_that_asks() -> None:
    for vocabulary in SIZES:
        asked = [
            SamplingParameters(
                temperature=0.0, processors=LogitsProcessors(min_tokens=3, withheld=(token,))
            )
            for token in (5, 6)
        ]
        batch = SamplingBatch.of(asked, [_new(one, [], vocabulary) for one in asked])
        logits = np.zeros((2, vocabulary), np.float32)
        logits[:, 5:7] = 10.0, 8.0
        assert sample(logits, batch, np.array([0, 0])).tolist() == [6, 5]


def _old(
    parameters: SamplingParameters, prompt: Sequence[int], vocabulary: int
) -> OldPenalties | None:
    if parameters.processors is None:
        return None
    return OldPenalties(parameters.processors, prompt, vocabulary)


def _new(
    parameters: SamplingParameters, prompt: Sequence[int], vocabulary: int
) -> PenaltyState | None:
    if parameters.processors is None:
        return None
    tokens = prompt_of(vocabulary, prompt, "L")
    return PenaltyState.of(parameters.processors, tokens, vocabulary)


@pytest.mark.parametrize("vocabulary", [4096, 151_936])
def test_top_p_next_to_where_a_token_reaches_it(vocabulary: int) -> None:
    """Nearer than a sum in float32 can tell."""
    weights = np.linspace(1.0, 0.5, 12)
    logits = np.full(vocabulary, -60.0, np.float32)
    logits[np.arange(12) * 17] = np.log(weights)
    reached = np.exp(np.log(weights).astype(np.float32).astype(np.float64)).cumsum()
    for border in (reached / reached[-1])[:-1].tolist():
        for top_p in (border * (1 - 1e-9), border * (1 + 1e-9)):
            parameters = SamplingParameters(top_p=top_p)
            expected = [old_sample(logits, parameters, position) for position in range(30)]
            assert _drawn(logits, parameters, range(30)) == expected


@pytest.mark.parametrize("every", [64, 128])
def test_a_sample_that_misleads_only_takes_longer(every: int) -> None:
    """The tokens that are looked at to guess where a nucleus ends are the likely ones."""
    logits = np.full(151_936, -1.0, np.float32)
    logits[::every] = 0
    for top_p in (0.01, 0.5, 0.9):
        parameters = SamplingParameters(top_p=top_p)
        expected = [old_sample(logits, parameters, position) for position in range(5)]
        assert _drawn(logits, parameters, range(5)) == expected


@pytest.mark.parametrize("seed", [2, 3])  # with 3, the largest logit is 0
def test_rough_exponents(seed: int) -> None:
    row = logits_of("model", 151_936, seed)
    scratch, best = estimates.Scratch.of(len(row)), float(row.max())
    for temperature in (1.0, 0.7):
        exponents = np.full_like(row, np.nan)
        estimates.roughly(row, best, temperature, scratch, exponents)
        assert np.allclose(exponents, (row - best) / temperature, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimate", ["roughly", "closely"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 3.0])
def test_estimates_are_as_good_as_they_say(estimate: str, shape: str, temperature: float) -> None:
    row = logits_of(shape, 151_936, 2)
    best = float(row.max())
    scratch = estimates.Scratch.of(len(row))
    sums = getattr(estimates, estimate)(row, best, temperature, scratch)
    weights = np.exp(row / np.float64(temperature) - best / temperature)
    upto = [math.fsum(weights[:end].tolist()) for end in (128, 12_800, 128_000, len(row))]
    found = sums.upto[[1, 100, 1000, -1]]
    assert np.abs(found - upto).max() <= sums.error / 2
    assert sums.error < 2e-5 * upto[-1]


def test_penalties_take_memory_for_the_tokens_that_there_are() -> None:
    """Also while streams join and leave: a parked one holds no memory of those it was with."""
    vocabulary, rng = 151_936, np.random.default_rng(0)
    processors = LogitsProcessors(repetition_penalty=1.2, bias=((7, 1.0),))
    sizes = 100, 1000, 1000  # the first one is full first
    prompts = [prompt_of(vocabulary, rng.integers(vocabulary, size=n), "L") for n in sizes]
    states = [PenaltyState.of(processors, prompt, vocabulary) for prompt in prompts]
    batch = SamplingBatch.of([SamplingParameters(processors=processors)] * 3, states)
    drawn = rng.integers(vocabulary, size=(500, 3))
    for tokens in drawn:
        batch.remember(tokens)
    for number, state in enumerate(states):
        found = dict(zip(state.tokens[: state.size].tolist(), state.counts.tolist(), strict=False))
        tokens, counts = np.unique(drawn[:, number], return_counts=True)
        expected = dict.fromkeys([7, *prompts[number].tokens.tolist()], 0)
        assert found == expected | dict(zip(tokens.tolist(), counts.tolist(), strict=True))
    parked = states[1]
    parked.detach()
    arrays = (parked.tokens, parked.offset, parked.repetition, parked.counts, parked.tail)
    assert all(each.base is None for each in arrays)
    seen = {7, *prompts[1].tokens.tolist(), *drawn[:, 1].tolist()}
    assert sorted(parked.tokens.tolist()) == sorted(seen)
    assert sum(each.nbytes for each in arrays) <= 32 * len(seen) + 512


@pytest.mark.parametrize("shape", ["model", "flat", "steps", "masked"])
def test_logprobs_of_long_rows(shape: str) -> None:
    rows = np.stack([logits_of(shape, 151_936, seed) for seed in range(2)])
    tokens = np.array([0, 151_935])
    logs = rows.astype(np.float64)
    logs -= logs.max(axis=1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
    own = logs[[0, 1], tokens]
    found = token_logprobs(rows, tokens, [0, 20])
    assert [one.logprob for one in found] == pytest.approx(own, abs=1e-9)
    assert found[0].top_ids == ()
    likely = np.argsort(-logs[1], kind="stable")[:20]
    assert found[1].top_ids == tuple(likely.tolist())
    assert found[1].top_logprobs == pytest.approx(logs[1][likely], abs=1e-9)
    assert surprisal(rows, tokens) == pytest.approx(-own / math.log(2), abs=1e-9)
