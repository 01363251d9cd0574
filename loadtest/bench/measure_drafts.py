"""What guessing ahead saves: `python tools/measure_drafts.py BUNDLE [PROMPT_FILE]`.

One stream alone, with drafts of 0, 4 and 8 tokens in turns; the medians are tokens per second after
the first token. That the tokens are the same is checked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from statistics import median

import numpy as np

from server.bundles.bundle import Bundle, load_bundle
from server.config import EngineConfig
from server.engine.engine import Engine
from server.engine.events import Delta, Request
from server.engine.sampling.sampler import SamplingParameters

_DRAFTS = (0, 4, 8)
_ROUNDS = 5
_PROMPT_TOKENS, _TOKENS = 300, 1500


async def measure(bundle: Bundle, prompt: bytes, temperature: float) -> dict[int, float]:
    """Tokens per second by the length of drafts. Raises AssertionError if tokens differ."""
    sampling = SamplingParameters(temperature=temperature, seed=1)
    tokens = np.array([bundle.manifest.vocabulary, *prompt])
    wanted = Request(tokens, sampling=sampling, max_tokens=_TOKENS)
    engines = {n: Engine(bundle, EngineConfig(slots=1, draft_tokens=n)) for n in _DRAFTS}
    rates: dict[int, list[float]] = {n: [] for n in _DRAFTS}
    said: set[tuple[int, ...]] = set()
    try:
        for _ in range(_ROUNDS):
            for drafts, engine in engines.items():
                ids, began = list[int](), 0.0
                async for event in engine.events(engine.submit(wanted)):
                    if isinstance(event, Delta):
                        began = began or time.perf_counter()
                        ids += event.tokens
                rates[drafts].append((len(ids) - 1) / (time.perf_counter() - began))
                said.add(tuple(ids))
    finally:
        for engine in engines.values():
            engine.close()
    assert len(said) == 1, "drafts changed what was said"
    return {drafts: median(each) for drafts, each in rates.items()}


def main() -> None:
    """Print one line of JSON for each temperature."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompt", type=Path, nargs="?", default=Path(argparse.__file__))
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.bundle)
    prompt = arguments.prompt.read_bytes()[20_000:][:_PROMPT_TOKENS]
    for temperature in (0.0, 0.6, 1.0):
        rates = asyncio.run(measure(bundle, prompt, temperature))
        ratios = {n: round(rate / rates[0], 2) for n, rate in rates.items()}
        print(json.dumps({"temperature": temperature, "tokens_per_s": rates, "ratios": ratios}))


if __name__ == "__main__":
    main()
