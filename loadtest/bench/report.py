"""What the measurements of a run say: figures, ratios within rounds, targets, doubts; and JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from loadtest.bench.contestants import OURS, OURS_1K
from loadtest.bench.plan import (
    Cell,
    Contestant,
    Plan,
    Shape,
    is_check,
    tokens_label,
)
from loadtest.bench.rounds import Round, Spread, fastest, movements, ratio, step_seconds
from loadtest.bench.run import CellResult, Entry, Group, Report
from loadtest.bench.worker import OK

FORMAT = 2
_MOST_BUSY = 0.05
"""Share of another's window that a waiting contestant may compute."""
_MOST_OTHERS = 0.1
"""Cores that other programs may use."""
_FEWEST_ROUNDS = 3
_NOT_NAMED = "those that --only leaves out"


@dataclass(frozen=True)
class Target:
    """What a ratio should be."""

    at_least: float | None = None
    at_most: float | None = None

    def met(self, ratio: float) -> bool:
        """Whether the ratio is so."""
        return (self.at_least is None or ratio >= self.at_least) and (
            self.at_most is None or ratio <= self.at_most
        )

    def __str__(self) -> str:
        bounds = ((">=", self.at_least), ("<=", self.at_most))
        return ", ".join(f"{sign} {bound:.4g}" for sign, bound in bounds if bound is not None)


_AS_THE_ENGINE = Target(at_least=0.95, at_most=1.05)
TARGETS = {
    "decode_16k_8_best": Target(at_least=30),
    "decode_16k_8_float32": Target(at_least=18),
    "decode_64k_8_best": Target(at_least=80),
    "decode_64k_8_float32": Target(at_least=45),
    "decode_256_1_best": Target(at_least=2),
    "decode_256_8_best": Target(at_least=3),
    "decode_256_32_best": Target(at_least=4),
    "decode_256_1_float32": Target(at_least=1.25),
    "first_token_16k_best": Target(at_least=6),
    "pretrained_256_1_best": Target(at_least=0.95),
    "pretrained_256_8_best": Target(at_least=0.95),
    "step_64k_over_1k_span_256_8": Target(at_most=1.3),
    "cache_64k_smallest_vs_full_float32": Target(at_most=1 / 500),
    "cache_64k_smallest_vs_smallest_rival": Target(at_most=1 / 120),
    "check_4k_8_genai-graph": _AS_THE_ENGINE,
    "check_4k_8_genai-int4-graph": _AS_THE_ENGINE,
}


@dataclass(frozen=True)
class Ratio:
    """A comparison of two contestants, in rounds that both finished."""

    name: str
    over: str
    """Whose seconds, or bytes, are divided."""
    under: str
    spread: Spread
    without: tuple[str, ...] = ()
    """Rivals that were not measured here, so that one of them may be the best."""

    @property
    def verdict(self) -> str:
        """Whether the target is met; empty without one."""
        target = TARGETS.get(self.name)
        if target is None:
            return ""
        if not target.met(self.spread.median):
            return "MISSED"
        return f"met, without {', '.join(self.without)}" if self.without else "met"


def base_of(contestants: Iterable[Contestant]) -> str:
    """Our setting in float32, or our first where none is; what other settings are held against."""
    ours = [c for c in contestants if c.role == "ours"]
    return next((c.name for c in (*(c for c in ours if c.is_float32), *ours)), OURS)


def key_of(plan: Plan, cell: Cell) -> str:
    """The beginning of the names of a cell's ratios."""
    return f"pretrained_{cell.key.removeprefix('decode_')}" if plan.source else cell.key


def all_rounds(result: CellResult) -> list[Round]:
    """Those of all groups: contestants of different groups never meet in one."""
    return [each for group in result.groups for each in group.rounds]


def ratios(report: Report) -> list[Ratio]:
    """Every comparison that the measurements allow. Of times, 2 means: ours takes half as long.

    `<cell>` begins with `pretrained` where all run one pretrained model.
    `<cell>_best`: our fastest setting and the fastest of all rivals, each cell anew.
    `<cell>_float32`: our float32 and the fastest rival whose weights and state are float32, too.
    `<cell>_<ours>_vs_<rival>`: those two settings of ours and every rival.
    `step_64k_over_1k_span_256_<streams>`: a step of ours at 64k and at 1k.
    `cache_<context>_…`: bytes of a stream's state.
    `check_<cell>_<name>`: a bare graph and the engine that it stands for.
    """
    return [each for result in report.results for each in _of_cell(report.plan, result)]


def _of_cell(plan: Plan, result: CellResult) -> Iterator[Ratio]:
    cell, rounds = result.cell, all_rounds(result)
    known = {c.name: c for c in plan.contestants}
    entries = {entry.name: entry for entry in result.entries}
    able = [known[name] for name, entry in entries.items() if entry.outcome == OK]
    ours = [c.name for c in able if c.role == "ours"]
    base = base_of(able)
    key = key_of(plan, cell)
    best = fastest(rounds, ours, base)
    rivals = [c for c in able if c.role == "rival" and not is_check(c, cell)]
    missing = [
        known[name]
        for name, entry in entries.items()
        if known[name].role == "rival" and entry.outcome != OK
    ]
    pairs = {
        (mine, rival.name): found
        for mine in dict.fromkeys((base, best))
        for rival in rivals
        if (found := ratio(rounds, rival.name, mine))
    }
    alike = {c.name for c in rivals if c.is_float32}
    for label, mine, names, away in (
        ("best", best, {c.name for c in rivals}, missing),
        ("float32", base, alike, [c for c in missing if c.is_float32]),
    ):
        if label == "float32" and not (mine in known and known[mine].is_float32):
            continue
        medians = {rival: pair.median for (us, rival), pair in pairs.items() if us == mine}
        if here := names & medians.keys():
            theirs = min(here, key=medians.__getitem__)
            without = (*(c.name for c in away), *([_NOT_NAMED] if plan.asked_for else []))
            yield Ratio(f"{key}_{label}", theirs, mine, pairs[mine, theirs], without)
    for (mine, theirs), pair in pairs.items():
        yield Ratio(f"{key}_{mine}_vs_{theirs}", theirs, mine, pair)
    if not cell.first_token and not plan.source:
        yield from _of_state(known, result)
    if at_1k := ratio(rounds, OURS, OURS_1K):
        yield Ratio(f"step_64k_over_1k_span_256_{cell.streams}", OURS, OURS_1K, at_1k)
    for check in (c for c in able if is_check(c, cell)):
        engine = check.name.removesuffix("-graph")
        if held := ratio(rounds, check.name, engine):
            name = f"check_{cell.key.removeprefix('decode_')}_{check.name}"
            yield Ratio(name, check.name, engine, held)


def _of_state(known: Mapping[str, Contestant], result: CellResult) -> Iterator[Ratio]:
    """Smallest states, of what a contestant offers: whether it ran does not matter."""
    sizes = {e.name: e.cache_bytes for e in result.entries}
    ours = [name for name in sizes if known[name].role == "ours"]
    rivals = [name for name in sizes if known[name].role == "rival"]
    full = [name for name in rivals if known[name].is_float32]
    for label, theirs in (("full_float32", full), ("smallest_rival", rivals)):
        if ours and theirs:
            under = min(theirs, key=sizes.__getitem__)
            over = min(ours, key=sizes.__getitem__)
            share = sizes[over] / sizes[under]
            name = f"cache_{tokens_label(result.cell.context)}_smallest_vs_{label}"
            if label == "full_float32" or under not in full:
                yield Ratio(name, over, under, Spread(share, share, share, 1))


def doubts(report: Report) -> list[str]:
    """What keeps the figures from being taken at their word, a sentence each."""
    found = []
    for result in report.results:
        rounds = all_rounds(result)
        for moved in movements(rounds):
            found.append(f"{result.cell}: the machine moved too much: {moved}")
        for group in result.groups:
            if len(group.rounds) < _FEWEST_ROUNDS:
                found.append(
                    f"{result.cell}: {len(group.rounds)} rounds are too few for a spread: "
                    f"--rounds {_FEWEST_ROUNDS} or more"
                )
        if result.others > _MOST_OTHERS:
            found.append(
                f"{result.cell}: other programs kept {result.others:.2g} cores busy (limit "
                f"{_MOST_OTHERS}), from which engines suffer in different degrees: repeat it alone"
            )
        for entry in result.entries:
            if entry.busy_while_waiting > _MOST_BUSY:
                found.append(
                    f"{result.cell}: {entry.name} computed {entry.busy_while_waiting:.0%} of the "
                    f"time of another's window (limit {_MOST_BUSY:.0%}): its threads do not sleep"
                )
    for each in ratios(report):
        target = TARGETS.get(each.name)
        if each.name.startswith("check_") and target and not target.met(each.spread.median):
            found.append(
                f"{each.over} takes {each.spread.median:.3g} times as long as {each.under}: its "
                "figures do not stand for those of the engine"
            )
    return list(dict.fromkeys(found))


def absent(report: Report) -> list[str]:
    """What was not measured, and why, a sentence each."""
    titles = {c.name: c.title for c in report.plan.contestants}
    lines: dict[str, list[str]] = {}
    for result in report.results:
        for entry in result.entries:
            if entry.outcome != OK:
                reason = f"{titles[entry.name]}: not measured: {entry.outcome}: {entry.detail}"
                lines.setdefault(reason, []).append(str(result.cell))
    return [f"{reason} ({', '.join(cells)})" for reason, cells in lines.items()]


def versions(report: Report) -> list[str]:
    """What computed, by engine."""
    titles = {c.name: c.title for c in report.plan.contestants}
    found = [
        f"{titles[entry.name]}: {entry.versions}"
        for result in report.results
        for entry in result.entries
        if entry.versions
    ]
    return list(dict.fromkeys(found))


def tokens_per_s(cell: Cell, rounds: Sequence[Round], name: str) -> Spread | None:
    """Tokens/s of all streams together."""
    steps = step_seconds(rounds, name)
    if steps is None:
        return None
    low, median, high = (cell.streams / s for s in (steps.high, steps.median, steps.low))
    return Spread(low, median, high, steps.count)


def as_json(report: Report, machine: Mapping[str, object]) -> dict[str, Any]:
    """Everything, ready for `json.dumps`."""
    figures = [
        {
            "cell": str(result.cell),
            "contestant": entry.name,
            "step_ms": _milliseconds(all_rounds(result), entry.name),
        }
        for result in report.results
        for entry in result.entries
        if entry.outcome == OK
    ]
    return {
        "format": FORMAT,
        "machine": dict(machine),
        **asdict(report),
        "figures": figures,
        "ratios": [{**asdict(r), "verdict": r.verdict} for r in ratios(report)],
        "targets": {name: str(target) for name, target in TARGETS.items()},
        "doubts": doubts(report),
        "absent": absent(report),
    }


def _milliseconds(rounds: Sequence[Round], name: str) -> dict[str, float]:
    steps = step_seconds(rounds, name)
    if steps is None:
        return {}
    return {key: getattr(steps, key) * 1e3 for key in ("low", "median", "high")}


def from_json(text: Mapping[str, Any]) -> Report:
    """The report in what `as_json` gave. Raises ValueError for another format."""
    if text.get("format") != FORMAT:
        raise ValueError(f"format is {text.get('format')}: this version reads {FORMAT}")
    plan = dict(text["plan"])
    contestants = tuple(
        Contestant(**{**c, "cells": tuple(Cell(**cell) for cell in c["cells"])})
        for c in plan["contestants"]
    )
    plan |= {
        "cells": tuple(Cell(**cell) for cell in plan["cells"]),
        "contestants": contestants,
        "shape": Shape(**plan["shape"]),
    }
    results = tuple(
        CellResult(
            Cell(**result["cell"]),
            tuple(Entry(**entry) for entry in result["entries"]),
            tuple(
                Group(
                    tuple(group["names"]),
                    tuple({n: (w[0], w[1]) for n, w in r.items()} for r in group["rounds"]),
                )
                for group in result["groups"]
            ),
            result["others"],
        )
        for result in text["results"]
    )
    return Report(Plan(**{f.name: plan[f.name] for f in fields(Plan) if f.name in plan}), results)
