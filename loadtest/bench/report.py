"""The report of a run of the bench: ratios, targets, tables, JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadtest.bench.plan import OURS, OURS_FLAT, OURS_FULL, Contestant, tokens_label
from loadtest.bench.run import FirstToken, Report, Result
from loadtest.bench.worker import FAILED, OK

FORMAT = 1


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
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"


TARGETS = {
    "decode_256_1_vs_best_f32": Target(at_least=1.2),
    "decode_256_8_vs_best_f32": Target(at_least=1.2),
    "decode_16k_8_vs_best": Target(at_least=15),
    "decode_64k_8_vs_best": Target(at_least=50),
    "step_64k_over_1k_span_256_1": Target(at_most=1.3),
    "step_64k_over_1k_span_256_8": Target(at_most=1.3),
    "step_64k_over_1k_span_256_32": Target(at_most=1.3),
    "cache_64k_vs_full": Target(at_most=0.01),
    "first_token_16k_vs_best": Target(at_most=0.25),
}


def ratios(report: Report) -> dict[str, float]:
    """Every comparison that the measurements allow.

    `decode_<context>_<streams>_vs_<whom>`: our tokens/s over theirs, `best` being the fastest, our
    own full attention included, `best_f32` the fastest with float32 weights, as ours are. Where a
    peer failed, the best is not known and left out.
    `step_64k_over_1k_span_256_<streams>`: seconds of a step, both with a span of 256.
    `cache_<context>_vs_full`: bytes of a stream's state over those of full attention.
    `first_token_<prompt>_vs_<whom>`: our seconds over theirs.
    """
    at = {(r.contestant, r.context, r.streams): r for r in report.results}
    peers = {c.name: c for c in report.plan.contestants if c.is_peer}
    found: dict[str, float] = {}
    for cell in report.plan.cells:
        label = tokens_label(cell.context)
        rates = {
            name: result.tokens_per_s
            for (name, context, streams), result in at.items()
            if (context, streams) == (cell.context, cell.streams)
            and result.outcome == OK
            and result.tokens_per_s
        }
        failed = any(
            at[key].outcome == FAILED
            for key in at
            if key[0] in peers and key[1:] == (cell.context, cell.streams)
        )
        for whom, rate in _opponents(rates, peers, max, known=not failed):
            found[f"decode_{label}_{cell.streams}_vs_{whom}"] = rates[OURS] / rate
        ours, full = (at.get((name, cell.context, cell.streams)) for name in (OURS, OURS_FULL))
        if ours and full:
            found[f"cache_{label}_vs_full"] = ours.cache_bytes / full.cache_bytes
        near = at.get((OURS_FLAT, 1024, cell.streams))
        if cell.context == 65_536 and ours and ours.tokens_per_s and near and near.tokens_per_s:
            name = f"step_64k_over_1k_span_256_{cell.streams}"
            found[name] = near.tokens_per_s / ours.tokens_per_s
    label = tokens_label(report.plan.prompt)
    seconds = {
        f.contestant: f.seconds for f in report.first_tokens if f.outcome == OK and f.seconds
    }
    failed = any(f.outcome == FAILED for f in report.first_tokens if f.contestant in peers)
    for whom, theirs in _opponents(seconds, peers, min, known=not failed):
        found[f"first_token_{label}_vs_{whom}"] = seconds[OURS] / theirs
    return found


def _opponents(
    figures: dict[str, float],
    peers: Mapping[str, Contestant],
    best: Callable[[Iterable[float]], float],
    *,
    known: bool,
) -> Iterable[tuple[str, float]]:
    """The figures to compare ours with: our own full attention, each peer, and the best."""
    if OURS not in figures:
        return
    theirs = {name: figure for name, figure in figures.items() if name in {*peers, OURS_FULL}}
    yield from theirs.items()
    if theirs and known:
        yield "best", best(theirs.values())
    alike = [figures[name] for name in theirs if name not in peers or peers[name].float32]
    if alike and known:
        yield "best_f32", best(alike)


def as_json(report: Report, machine: dict[str, object]) -> dict[str, object]:
    """Everything, ready for `json.dumps`."""
    plan = asdict(report.plan)
    compared = ratios(report)
    return {
        "format": FORMAT,
        "machine": machine,
        "plan": plan,
        "cells": [asdict(result) for result in report.results],
        "first_tokens": [asdict(first) for first in report.first_tokens],
        "ratios": compared,
        "targets": {
            name: {"target": str(target), "met": target.met(compared[name])}
            for name, target in TARGETS.items()
            if name in compared
        },
    }


def render(report: Report) -> RenderableType:
    """Tokens/s and state of every cell, seconds to the first token, and the ratios with targets."""
    parts: list[RenderableType] = [_cells(report)]
    if report.first_tokens:
        parts.append(_first_tokens(report))
    parts += [_ratios(ratios(report)), *_remarks(report)]
    return Group(*parts)


def _cells(report: Report) -> Table:
    table = Table(
        title="Tokens/s of all streams together (MB of state of one)", title_justify="left"
    )
    table.add_column("context x streams")
    present = {result.contestant for result in report.results}
    contestants = [c for c in report.plan.contestants if c.name in present]
    for contestant in contestants:
        table.add_column(contestant.name, justify="right")
    at = {(r.contestant, r.context, r.streams): r for r in report.results}
    for cell in report.plan.cells:
        row = (at.get((c.name, cell.context, cell.streams)) for c in contestants)
        table.add_row(str(cell), *(_cell(result) for result in row))
    return table


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    if result.outcome != OK or result.tokens_per_s is None:
        return result.outcome
    return f"{result.tokens_per_s:,.0f} ({result.cache_bytes / 1e6:,.1f})"


def _first_tokens(report: Report) -> Table:
    table = Table(
        title=f"Seconds to the first token of a prompt of {report.plan.prompt:,}",
        title_justify="left",
    )
    table.add_column("engine")
    table.add_column("seconds", justify="right")
    titles = {c.name: c.title for c in report.plan.contestants}
    for first in report.first_tokens:
        table.add_row(titles[first.contestant], _seconds(first))
    return table


def _seconds(first: FirstToken) -> str:
    return first.outcome if first.seconds is None else f"{first.seconds:.2f}"


def _ratios(found: dict[str, float]) -> Table:
    table = Table(title="Ratios", title_justify="left")
    for column in ("ratio", "is", "target", ""):
        table.add_column(column)
    for name, ratio in found.items():
        target = TARGETS.get(name)
        verdict = "" if target is None else "met" if target.met(ratio) else "MISSED"
        table.add_row(name, f"{ratio:.4g}", str(target or ""), verdict)
    return table


def _remarks(report: Report) -> list[RenderableType]:
    """Why cells are empty, one line for each contestant and reason."""
    titles = {c.name: c.title for c in report.plan.contestants}
    everything: tuple[Result | FirstToken, ...] = (*report.results, *report.first_tokens)
    lines = dict.fromkeys(
        f"{titles[each.contestant]}: {each.outcome}: {each.detail}"
        for each in everything
        if each.outcome != OK
    )
    return [Text(line) for line in lines]
