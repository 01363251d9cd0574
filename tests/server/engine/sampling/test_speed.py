"""How long a step of 32 streams draws from a large vocabulary.

    pytest -m slow -s -n 0 tests/server/engine/sampling/test_speed.py

prints it, beside the sampler that is the oracle.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import quantiles

import numpy as np
import pytest

from server.arrays import Floats
from server.engine.sampling.logits_processors import PenaltyState
from server.engine.sampling.sampler import SamplingBatch, sample
from server.request import LogitsProcessors, SamplingParameters, prompt_of
from tests.server.engine.sampling.old_sampler import OldPenalties, old_sample
from tests.server.engine.sampling.test_same_tokens import logits_of

VOCABULARY, ROWS, GENEROUS = 151_936, 32, 4.0
PENALTIES = LogitsProcessors(repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.2)
BIASES = LogitsProcessors(bias=tuple((token, 1.5) for token in range(0, 3000, 10)))
WORDS = LogitsProcessors(bad_words=tuple((token, token + 1) for token in range(60)))
CASES: list[tuple[str, float, dict[str, object]]] = [
    ("T = 1", 6, {}),
    ("T = 0.8", 6, {"temperature": 0.8}),
    ("top_k", 6, {"temperature": 0.8, "top_k": 50}),
    ("top_p", 6, {"temperature": 0.8, "top_p": 0.95}),
    ("min_p", 6, {"temperature": 0.8, "min_p": 0.05}),
    ("top_k, top_p and min_p", 6, {"temperature": 0.8, "top_k": 200, "top_p": 0.95, "min_p": 0.02}),
    ("typical_p", 12, {"typical_p": 0.9}),
    ("20 log-probabilities", 12, {"logprobs": 20}),
    ("penalties", 12, {"processors": PENALTIES}),
    ("penalties and top_p", 12, {"processors": PENALTIES, "temperature": 0.8, "top_p": 0.95}),
    ("300 biases", 12, {"processors": BIASES}),
    ("60 bad words", 12, {"processors": WORDS}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target_ms", "fields"), CASES, ids=[name for name, _, _ in CASES])
def test_a_step_of_a_large_vocabulary(
    name: str, target_ms: float, fields: dict[str, object]
) -> None:
    """In time of the processor, of which other work on the machine takes none."""
    logits = np.stack([logits_of("model", VOCABULARY, 2 * seed) for seed in range(ROWS)])
    parameters = [SamplingParameters(seed=seed, **fields) for seed in range(ROWS)]  # type: ignore[arg-type]
    prompt = np.random.default_rng(0).integers(VOCABULARY, size=2000)
    new, old = _new(logits, parameters, prompt), _old(logits, parameters, prompt)
    ours, oracle = [], []
    for _ in range(3):
        oracle.append(_seconds(old))
        ours += [_seconds(new) for _ in range(7)]
    low, median, high = quantiles(ours, n=4)
    print(f"\n{name}: {median * 1e3:.1f} ms ({low * 1e3:.1f} - {high * 1e3:.1f}), ", end="")
    print(f"target {target_ms:.0f} ms, {min(oracle) * 1e3:.0f} ms before", end="")
    assert min(ours) < GENEROUS * target_ms / 1e3
    assert min(ours) < min(oracle) / 3


def _new(
    logits: Floats, parameters: list[SamplingParameters], prompt: np.ndarray
) -> Callable[[], object]:
    tokens = prompt_of(VOCABULARY, prompt, "L")
    states = [
        p.processors and PenaltyState.of(p.processors, tokens, VOCABULARY) for p in parameters
    ]
    batch, positions = SamplingBatch.of(parameters, states), np.full(len(parameters), len(prompt))

    def step() -> None:
        drawn = sample(logits, batch, positions)
        batch.remember(drawn)
        batch.logprobs(logits, drawn)
        positions[:] += 1

    return step


def _old(
    logits: Floats, parameters: list[SamplingParameters], prompt: np.ndarray
) -> Callable[[], object]:
    seen = prompt.tolist()
    states = [p.processors and OldPenalties(p.processors, seen, VOCABULARY) for p in parameters]

    def step() -> None:
        for row, one, state in zip(logits, parameters, states, strict=True):
            old_sample(row, one, len(seen), state)
            if one.logprobs is not None:
                logs = row.astype(np.float64)
                np.argsort(-logs, kind="stable")[: one.logprobs]
                np.exp(logs - logs.max()).sum()

    return step


def _seconds(step: Callable[[], object]) -> float:
    began = time.thread_time()
    step()
    return time.thread_time() - began
