"""Requests as they once came: a trace in the format of Mooncake's.

One JSON object a line: `timestamp` in milliseconds, `input_length` and `output_length` in tokens,
and `hash_ids`, which say what prompts have in common: equal ids are equal blocks of 512 tokens.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loadtest.workload import Request

_BLOCK: Final = 512


@dataclass(frozen=True, slots=True)
class Entry:
    """One request of a trace. blocks: names of the blocks that its prompt consists of."""

    due_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]


def read_trace(path: Path, *, speed: float = 1.0, scale: float = 1.0) -> tuple[Entry, ...]:
    """The requests of a file in the order of their times, the first of which becomes 0.

    speed: how much faster it is replayed. scale: what lengths are multiplied with.
    Raises ValueError with the number of a line that is none, and for a file without any.
    """
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                entries.append(_entry(json.loads(line), speed, scale))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}, line {number}: {error or type(error).__name__}; a line has "
                    "timestamp (ms), input_length and output_length (tokens, 1 or more), and "
                    "hash_ids (numbers) if it likes"
                ) from None
    if not entries:
        raise ValueError(f"{path} holds no request; give one JSON object on each line")
    entries.sort(key=lambda entry: entry.due_s)
    first_s = entries[0].due_s
    return tuple(
        Entry(e.due_s - first_s, e.prompt_tokens, e.output_tokens, e.blocks) for e in entries
    )


def _entry(line: dict[str, Any], speed: float, scale: float) -> Entry:
    due_s = float(line["timestamp"]) / 1e3 / speed
    if not math.isfinite(due_s):
        raise ValueError("timestamp is not finite")
    blocks = tuple(int(block) for block in line.get("hash_ids", ()))
    prompt, output = (_length(line, name, scale) for name in ("input_length", "output_length"))
    return Entry(due_s, prompt, output, blocks)


def _length(line: dict[str, Any], name: str, scale: float) -> int:
    length = line[name]
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"{name} is {length!r}")
    return max(1, round(length * scale))


def trace_requests(
    entries: Sequence[Entry],
    seed: int,
    *,
    vocabulary: int,
    scale: float = 1.0,
    begin: int | None = None,
    has_begin: bool = True,
) -> Iterator[tuple[float, Request]]:
    """When each request is due, and the request; prompts share what they shared in the trace.

    The other arguments are as those of `workload.draw_requests`.
    """
    rng = random.Random(seed)
    ids = range(vocabulary)
    block_size = max(1, round(_BLOCK * scale))
    for entry in entries:
        size = entry.prompt_tokens + (not has_begin)
        prompt: list[int] = []
        for block in entry.blocks:
            if len(prompt) < size:
                prompt += random.Random(f"{seed} {block}").choices(ids, k=block_size)
        prompt += rng.choices(ids, k=max(0, size - len(prompt)))
        del prompt[size:]
        yield (
            entry.due_s,
            Request(
                tuple(prompt),
                entry.output_tokens,
                rng.getrandbits(63),
                has_begin and prompt[0] != begin,
            ),
        )
