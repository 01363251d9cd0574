"""When the requests of an open loop are due, as seconds from its beginning."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

_KINDS: Final = "constant, poisson, or gamma:B with B above 0 (below 1 in bursts, 1 is poisson)"


@dataclass(frozen=True, slots=True)
class Arrivals:
    """How regular the gaps between requests are, whose mean the rate gives.

    burstiness: the shape of their gamma distribution: 1 for a Poisson process, as of many
    independent callers; below 1 they come in bursts; infinity for a clock.
    """

    burstiness: float = 1.0

    def __str__(self) -> str:
        if self.burstiness == 1:
            return "poisson"
        return "constant" if math.isinf(self.burstiness) else f"gamma:{self.burstiness:g}"


POISSON: Final = Arrivals()


def parse_arrivals(text: str) -> Arrivals:
    """`constant`, `poisson`, `gamma:0.5`. Raises ValueError for anything else."""
    kind, _, shape = text.partition(":")
    if text == "constant":
        return Arrivals(math.inf)
    if text == "poisson":
        return POISSON
    try:
        burstiness = float(shape) if kind == "gamma" else 0.0
    except ValueError:
        burstiness = 0.0
    if not 0 < burstiness < math.inf:
        raise ValueError(f"{text!r} is no way to arrive; give {_KINDS}")
    return Arrivals(burstiness)


def due_times(
    rate: float, arrivals: Arrivals, rng: random.Random, *, ramp_s: float = 0.0
) -> Iterator[float]:
    """Without end: `rate` requests per second, which it takes `ramp_s` seconds to reach.

    In the ramp the rate grows evenly from nothing, so that it has half as many requests.
    """
    draw = _gaps(arrivals, rng)
    in_ramp = rate * ramp_s / 2
    done = 0.0
    while True:
        done += draw()
        if done < in_ramp:
            yield math.sqrt(2 * done * ramp_s / rate)
        else:
            yield done / rate + ramp_s / 2


def _gaps(arrivals: Arrivals, rng: random.Random) -> Callable[[], float]:
    """Draws a gap, whose mean is 1."""
    shape = arrivals.burstiness
    if math.isinf(shape):
        return lambda: 1.0
    return lambda: rng.gammavariate(shape, 1 / shape)
