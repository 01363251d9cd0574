"""One run after the other, along an axis: context, streams at once, or rate up to the knee."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from concertina.client.channel import Access
from loadtest.measure import Plan, opened, require_fit, run_plan
from loadtest.reports.objectives import Objective
from loadtest.reports.report import Report, summarise
from loadtest.run import Run
from loadtest.target import Served
from loadtest.workload import Lengths

_NUMBER: Final = re.compile(r"(\d+(?:\.\d+)?)(k?)")
_MOST_POINTS: Final = 64
_NEXT_SEED: Final = 1_000_003
_MET = 0.9
_KEPT_UP = 0.8
_GAIN = 0.1
_REFUSED = 0.01


class Axis(StrEnum):
    """What changes from run to run.

    CONTEXT: tokens of a stream at its end, prompt and output; CONCURRENCY: streams at once; RATE:
    requests per second.
    """

    CONTEXT = "context"
    CONCURRENCY = "concurrency"
    RATE = "rate"


@dataclass(frozen=True, slots=True)
class Sweep:
    """The values that an axis takes, which rise."""

    axis: Axis
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a sweep. saturated: why the server can do no more, empty if it can."""

    value: float
    report: Report
    saturated: str = ""

    @property
    def label(self) -> str:
        """The value as it was given: 4096 is 4k."""
        whole = self.value >= 1024 and self.value % 1024 == 0
        return f"{self.value / 1024:g}k" if whole else f"{self.value:g}"


@dataclass(frozen=True, slots=True)
class Series:
    """What was run. axis: None for one run alone, which is the only point then.

    runs: one for each point. knee: where the server saturates, as a sentence; empty where there is
    none.
    """

    served: Served
    axis: Axis | None
    points: tuple[Point, ...]
    runs: tuple[Run, ...]
    knee: str = ""


def parse_sweep(text: str) -> Sweep:
    """`context=1k..64k` doubles from 1,024 to 65,536; `rate=1,2,5` names values.

    Raises ValueError for anything else.
    """
    name, _, values = text.partition("=")
    try:
        axis, found = Axis(name), _values(values)
        whole = axis is Axis.RATE or all(value == int(value) for value in found)
        if not whole or list(found) != sorted(set(found)) or not 0 < len(found) <= _MOST_POINTS:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{text!r} is no sweep; give context, concurrency or rate, and what rises: "
            "context=1k..64k doubles, rate=1,2,5 names values"
        ) from None
    return Sweep(axis, found)


def _values(text: str) -> tuple[float, ...]:
    first, dots, last = text.partition("..")
    if not dots:
        return tuple(_number(each) for each in text.split(","))
    low, high = _number(first), _number(last)
    return tuple(low * 2**i for i in range(math.floor(math.log2(high / low)) + 1))


def _number(text: str) -> float:
    found = _NUMBER.fullmatch(text.strip())
    if found is None or float(found[1]) == 0:
        raise ValueError
    return float(found[1]) * (1024 if found[2] else 1)


def saturation(axis: Axis, before: Point | None, value: float, report: Report) -> str:
    """Why the server can do no more at this point than at the one before; empty if it can."""
    if axis is Axis.CONTEXT:
        return ""
    if report.objectives and report.met_share < _MET:
        return f"{report.met_share:.0%} of the requests met the objectives"
    if report.requests and report.refused / report.requests > _REFUSED:
        return f"{report.refused:,} of {report.requests:,} requests were refused"
    if axis is Axis.RATE:
        if report.keeps_up is not None and report.keeps_up < _KEPT_UP:
            return f"streams ended at {report.keeps_up:.0%} of the rate at which requests came"
        return ""
    if before is not None:
        possible = value / before.value - 1
        gain = report.tokens_per_s / max(before.report.tokens_per_s, 1e-9) - 1
        if gain < _GAIN * possible:
            return f"tokens/s changed by {gain:+.0%} for {possible:+.0%} streams"
    return ""


def knee(axis: Axis, points: Sequence[Point]) -> str:
    """Where the server saturates, as a sentence; empty where the axis has no knee."""
    if axis is Axis.CONTEXT or not points:
        return ""
    last = points[-1]
    if not last.saturated:
        return f"No knee up to {axis} {last.label}: the server could take more."
    before = f"the knee is at {axis} {points[-2].label}" if len(points) > 1 else "no lower point"
    return f"Saturated at {axis} {last.label}: {last.saturated}; {before}."


def at(plan: Plan, axis: Axis, value: float) -> Plan:
    """The plan at a point of a sweep. Raises ValueError for one that cannot be."""
    match axis:
        case Axis.RATE:
            return replace(plan, rate=value)
        case Axis.CONCURRENCY:
            streams = int(value)
            warmup = streams if plan.warmup == plan.streams else plan.warmup
            return replace(plan, streams=streams, warmup=warmup)
        case Axis.CONTEXT:
            prompt = int(value) - plan.output_tokens.high
            if prompt < 0:
                raise ValueError(
                    f"a context of {value:g} tokens has no room for --output-tokens "
                    f"{plan.output_tokens}; lower that, or begin with a longer context"
                )
            return replace(plan, prompt_tokens=Lengths(prompt, prompt))


async def run_series(
    plan: Plan,
    access: Access,
    sweep: Sweep | None,
    *,
    objectives: Sequence[Objective],
    max_lag_s: float,
) -> Series:
    """Runs the plan, or the plan at each point of the sweep up to its knee.

    Raises what `measure` raises.
    """
    points: list[Point] = []
    runs: list[Run] = []
    async with opened(plan, access) as target:
        if sweep is None:
            run = await run_plan(plan, target)
            report = summarise(run, max_lag_s=max_lag_s, objectives=objectives)
            return Series(target.served, None, (Point(0, report),), (run,))
        for value in sweep.values:  # before any of them runs for minutes
            require_fit(at(plan, sweep.axis, value), target.served)
        for index, value in enumerate(sweep.values):
            # Prompts of one seed begin alike, and a server may remember how others began.
            here = replace(at(plan, sweep.axis, value), seed=plan.seed + _NEXT_SEED * index)
            before = points[-1] if points else None
            run = await run_plan(here, target, f"{sweep.axis} {value:g}")
            report = summarise(run, max_lag_s=max_lag_s, objectives=objectives)
            saturated = saturation(sweep.axis, before, value, report)
            points.append(Point(value, report, saturated))
            runs.append(run)
            if saturated or run.interrupted:
                break
    return Series(target.served, sweep.axis, tuple(points), tuple(runs), knee(sweep.axis, points))
