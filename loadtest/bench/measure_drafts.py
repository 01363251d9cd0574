"""What guessing ahead saves: one stream alone, with drafts of 0, 4 and 8 tokens in turns."""

from __future__ import annotations

import argparse  # for its source
import asyncio
import json
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from loadtest.bench.adapters.ours import generate, open_engine
from loadtest.bench.rounds import Round, movements, ratio, step_seconds, turns

_DRAFTS = (0, 4, 8)
_TEMPERATURES = (0.0, 0.6, 1.0)
_PROMPT_FROM, _PROMPT_TOKENS = 20_000, 300


def measure_drafts(
    bundle: Annotated[Path, typer.Argument(exists=True, help="Bundle of a byte model.")],
    prompt_file: Annotated[
        Path, typer.Argument(exists=True, help="File with the prompt's text.", show_default=False)
    ] = Path(argparse.__file__),
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the stream.")] = 1500,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, there and back; medians.")] = 5,
) -> None:
    """Print tokens/s after the first token for each length of drafts, one temperature a line.

    Drafts must not change the tokens: that is checked.

    Examples:
    python -m loadtest.bench.measure_drafts bundles/python-4k
    python -m loadtest.bench.measure_drafts bundles/python-4k prompt.py --rounds 1
    """
    prompt = prompt_file.read_bytes()[_PROMPT_FROM:][:_PROMPT_TOKENS]
    for temperature in _TEMPERATURES:
        seen = asyncio.run(_measure(bundle, prompt, temperature, tokens, rounds))
        seconds = {n: step_seconds(seen, str(n)) for n in _DRAFTS}
        ratios = {n: ratio(seen, "0", str(n)) for n in _DRAFTS}
        line = {
            "temperature": temperature,
            "tokens_per_s": {n: 1 / each.median for n, each in seconds.items() if each},
            "ratios": {n: asdict(each) for n, each in ratios.items() if each},
            "doubts": [f"the machine moved too much: {moved}" for moved in movements(seen)],
        }
        print(json.dumps(line))


async def _measure(
    bundle: Path, prompt: bytes, temperature: float, tokens: int, rounds: int
) -> list[Round]:
    """Seconds of a token by the length of drafts. Raises AssertionError if tokens differ."""
    wanted = np.array([*prompt], np.int64)
    seen: list[Round] = []
    outputs: set[tuple[int, ...]] = set()
    with ExitStack() as stack:
        engines = {
            n: stack.enter_context(open_engine(bundle, slots=1, threads=0, draft_tokens=n))
            for n in _DRAFTS
        }
        for _ in range(rounds):
            windows: dict[str, list[float]] = {}
            for name in turns([str(drafts) for drafts in engines]):
                engine = engines[int(name)]
                ids, began = list[int](), 0.0
                async for new in generate(
                    engine, wanted, tokens=tokens, seed=1, temperature=temperature
                ):
                    began = began or time.perf_counter()
                    ids += new
                windows.setdefault(name, []).append((time.perf_counter() - began) / (len(ids) - 1))
                outputs.add(tuple(ids))
            seen.append({name: (w[0], w[1]) for name, w in windows.items()})
    assert len(outputs) == 1, "drafts change the tokens"
    return seen


if __name__ == "__main__":
    typer.run(measure_drafts)
