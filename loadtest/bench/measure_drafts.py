"""What guessing ahead saves: one stream alone, with drafts of 0, 4 and 8 tokens in turns."""

from __future__ import annotations

import argparse  # for its source
import asyncio
import json
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer

from loadtest.bench.adapters.ours import generate, open_engine

_DRAFTS = (0, 4, 8)
_TEMPERATURES = (0.0, 0.6, 1.0)
_PROMPT_FROM, _PROMPT_TOKENS = 20_000, 300


def measure_drafts(
    bundle: Annotated[Path, typer.Argument(exists=True, help="Bundle of a byte model.")],
    prompt_file: Annotated[
        Path, typer.Argument(exists=True, help="File with the prompt's text.", show_default=False)
    ] = Path(argparse.__file__),
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the stream.")] = 1500,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are printed.")] = 5,
) -> None:
    """Print tokens/s after the first token for each length of drafts, one temperature a line.

    Drafts must not change the tokens: that is checked.

    Examples:
    python -m loadtest.bench.measure_drafts bundles/python-4k
    python -m loadtest.bench.measure_drafts bundles/python-4k prompt.py --rounds 1
    """
    prompt = prompt_file.read_bytes()[_PROMPT_FROM:][:_PROMPT_TOKENS]
    for temperature in _TEMPERATURES:
        rates = asyncio.run(_measure(bundle, prompt, temperature, tokens, rounds))
        ratios = {n: round(rate / rates[0], 2) for n, rate in rates.items()}
        print(json.dumps({"temperature": temperature, "tokens_per_s": rates, "ratios": ratios}))


async def _measure(
    bundle: Path, prompt: bytes, temperature: float, tokens: int, rounds: int
) -> dict[int, float]:
    """Tokens/s by the length of drafts. Raises AssertionError if tokens differ."""
    wanted = np.array([*prompt], np.int64)
    rates: dict[int, list[float]] = {n: [] for n in _DRAFTS}
    outputs: set[tuple[int, ...]] = set()
    with ExitStack() as stack:
        engines = {
            n: stack.enter_context(open_engine(bundle, slots=1, threads=0, draft_tokens=n))
            for n in _DRAFTS
        }
        for _ in range(rounds):
            for drafts, engine in engines.items():
                ids, began = list[int](), 0.0
                async for new in generate(
                    engine, wanted, tokens=tokens, seed=1, temperature=temperature
                ):
                    began = began or time.perf_counter()
                    ids += new
                rates[drafts].append((len(ids) - 1) / (time.perf_counter() - began))
                outputs.add(tuple(ids))
    assert len(outputs) == 1, "drafts change the tokens"
    return {drafts: median(each) for drafts, each in rates.items()}


if __name__ == "__main__":
    typer.run(measure_drafts)
