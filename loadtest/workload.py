"""What the server is asked for: a seeded, endless sequence of requests."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lengths:
    """Numbers of tokens from `low` to `high`, both included."""

    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        """One of them, each as likely as the others."""
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class Request:
    """One stream to ask for. The prompt is text, token ids, or None for an unconditional start.

    first_counts: whether the server counts the first id; not if it is what others follow from.
    """

    prompt: str | tuple[int, ...] | None
    output_tokens: int
    seed: int
    first_counts: bool = True


def parse_lengths(text: str, *, minimum: int) -> Lengths:
    """`256` or `128-512`. Raises ValueError for anything else, and for less than `minimum`."""
    first, dash, last = text.partition("-")
    try:
        lengths = Lengths(int(first), int(last if dash else first))
    except ValueError:
        raise ValueError(
            f"{text!r} is no length; give a number (256) or a range (128-512)"
        ) from None
    if not minimum <= lengths.low <= lengths.high:
        raise ValueError(f"{text!r} must rise, and start at {minimum} or more")
    return lengths


def draw_requests(
    seed: int,
    *,
    vocabulary: int,
    prompt_lengths: Lengths,
    output_lengths: Lengths,
    prompts: Sequence[str] = (),
    begin: int | None = None,
    has_begin: bool = True,
) -> Iterator[Request]:
    """Requests without end, the same for the same arguments.

    Prompts are drawn from `prompts`, or else are `prompt_lengths` random ids below `vocabulary`.
    begin: the id of the token that the server puts before each prompt, and would not count twice.
    has_begin: whether the model can begin with nothing; for one that cannot, a prompt has one id
    more, which the server does not count.
    """
    rng = random.Random(seed)
    ids = range(vocabulary)
    while True:
        prompt: str | tuple[int, ...] | None
        if prompts:
            prompt, first_counts = rng.choice(prompts), True
        else:
            size = prompt_lengths.draw(rng) + (not has_begin)
            prompt = tuple(rng.choices(ids, k=size)) or None
            first_counts = has_begin and not (prompt and prompt[0] == begin)
        yield Request(prompt, output_lengths.draw(rng), rng.getrandbits(63), first_counts)
