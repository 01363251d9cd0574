"""The report of a run as tables: for a terminal, and in Markdown for docs/performance.md.

python -m loadtest.bench.tables bench.json                         # print
python -m loadtest.bench.tables bench.json docs/performance.md     # replace what is there
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadtest.bench.report import (
    TARGETS,
    Ratio,
    absent,
    all_rounds,
    base_of,
    doubts,
    from_json,
    ratios,
    tokens_per_s,
    versions,
)
from loadtest.bench.rounds import Round, Spread, fastest, ratio, step_seconds
from loadtest.bench.run import CellResult, Entry, Report
from loadtest.bench.worker import OK

BEGIN = "<!-- Written by python -m loadtest.bench.tables: begin -->"
END = "<!-- Written by python -m loadtest.bench.tables: end -->"
BEGIN_PRETRAINED = BEGIN.replace("tables:", "tables, pretrained:")
END_PRETRAINED = END.replace("tables:", "tables, pretrained:")


def render(report: Report) -> RenderableType:
    """A table for each cell, then the ratios with targets, then what was not measured, and doubts.

    In brackets: the quartiles of the windows, or of the rounds where it is a ratio.
    """
    parts: list[RenderableType] = [_cell_table(report, result) for result in report.results]
    parts.append(_ratio_table([r for r in ratios(report) if _is_headline(r)]))
    parts += [Text(line) for line in (*absent(report), *doubts(report))]
    return Group(*parts)


def _cell_table(report: Report, result: CellResult) -> Table:
    titles = {c.name: c.title for c in report.plan.contestants}
    rounds = all_rounds(result)
    ours = [c.name for c in report.plan.contestants if c.role == "ours"]
    base = base_of(report.plan.contestants)
    best = fastest(rounds, ours, base)
    title = f"{report.plan.source}, {result.cell}" if report.plan.source else str(result.cell)
    table = Table(title=title, title_justify="left")
    table.add_column("engine")
    unit = "s" if result.cell.first_token else "ms a step"
    for column in (unit, "tokens/s", "of a stream", "MB of a stream", f"/ {base}", f"/ {best}"):
        table.add_column(column, justify="right")
    for entry in result.entries:
        table.add_row(
            titles[entry.name],
            _duration(result, rounds, entry),
            _rate(result, rounds, entry, 1),
            _rate(result, rounds, entry, result.cell.streams),
            "" if result.cell.first_token else f"{entry.cache_bytes / 1e6:,.1f}",
            *(str(ratio(rounds, entry.name, mine) or "") for mine in (base, best)),
        )
    return table


def _duration(result: CellResult, rounds: Sequence[Round], entry: Entry) -> str:
    steps = step_seconds(rounds, entry.name)
    if entry.outcome != OK or steps is None:
        return entry.outcome
    scale = 1.0 if result.cell.first_token else 1e3
    return str(Spread(steps.low * scale, steps.median * scale, steps.high * scale, steps.count))


def _rate(result: CellResult, rounds: Sequence[Round], entry: Entry, streams: int) -> str:
    rate = tokens_per_s(result.cell, rounds, entry.name)
    if entry.outcome != OK or rate is None or result.cell.first_token:
        return ""
    return f"{rate.median / streams:,.0f}"


def _is_headline(found: Ratio) -> bool:
    return found.name in TARGETS or found.name.endswith(("_best", "_float32"))


def _ratio_table(found: Iterable[Ratio]) -> Table:
    table = Table(title="Ratios within rounds", title_justify="left")
    for column in ("ratio", "of", "is", "target", ""):
        table.add_column(column)
    for each in found:
        table.add_row(
            each.name,
            f"{each.over} / {each.under}",
            str(each.spread),
            str(TARGETS.get(each.name, "")),
            each.verdict,
        )
    return table


def markdown(report: Report, machine: dict[str, Any]) -> str:
    """The same for a document: contestants by cells, then the ratios, then the remarks."""
    cells = [str(result.cell) for result in report.results]
    lines = [
        f"{f'{report.plan.source}; ' if report.plan.source else ''}"
        f"{machine.get('cpu')}, {report.plan.threads} threads; ms a step (first token: s), median "
        "and quartiles of all windows:",
        "",
        *_row(["", *cells]),
        *_row(["---"] * (len(cells) + 1)),
    ]
    names = {entry.name for result in report.results for entry in result.entries}
    for contestant in (c for c in report.plan.contestants if c.name in names):
        row = [contestant.title]
        for result in report.results:
            here = next((e for e in result.entries if e.name == contestant.name), None)
            row.append(_duration(result, all_rounds(result), here) if here else "")
        lines += _row(row)
    lines += ["", *_row(["ratio", "of", "median and quartiles of the rounds", "target", ""])]
    lines += _row(["---"] * 5)
    for each in (r for r in ratios(report) if _is_headline(r)):
        verdict = each.verdict.replace("MISSED", "**missed**")
        target = str(TARGETS.get(each.name, ""))
        between = f"{each.over} / {each.under}"
        lines += _row([f"`{each.name}`", between, str(each.spread), target, verdict])
    engines = "; ".join(versions(report))
    remarks = [*([engines] if engines else []), *absent(report), *doubts(report)]
    if remarks:
        lines += ["", *(f"- {remark}" for remark in remarks)]
    return "\n".join(lines)


def _row(texts: Iterable[str]) -> list[str]:
    return ["| " + " | ".join(texts) + " |"]


def put_between(document: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """`document` with `text` in place of what is between the marks. Raises ValueError."""
    before, found, rest = document.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"the document has no lines {begin!r} and {end!r}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def tables(
    files: Annotated[
        list[Path], typer.Argument(help="JSON files of the bench; then perhaps a document.")
    ],
) -> None:
    """Print the tables of one or several runs in Markdown, or put them into a document (.md).

    Examples:
    python -m loadtest.bench.tables bench.json
    python -m loadtest.bench.tables short.json long.json docs/performance.md
    """
    documents = [path for path in files if path.suffix == ".md"]
    found = [
        json.loads(path.read_text(encoding="utf-8")) for path in files if path not in documents
    ]
    if not found or len(documents) > 1:
        raise typer.BadParameter("name JSON files of the bench, and at most one document")
    report = join([from_json(each) for each in found])
    text = markdown(report, found[0]["machine"])
    if not documents:
        typer.echo(text)
    for path in documents:
        marks = (BEGIN_PRETRAINED, END_PRETRAINED) if report.plan.source else (BEGIN, END)
        whole = put_between(path.read_text(encoding="utf-8"), text, *marks)
        path.write_text(whole, encoding="utf-8")


def join(reports: Sequence[Report]) -> Report:
    """Several runs with different cells as one; of a cell, the last run counts."""
    if len({report.plan.source for report in reports}) > 1:
        raise typer.BadParameter("these files are of different models: name those of one")
    by_cell = {result.cell: result for report in reports for result in report.results}
    known = {c.name: c for report in reports for c in report.plan.contestants}
    ordered = sorted(by_cell, key=lambda cell: (cell.first_token, cell))
    plan = replace(reports[-1].plan, cells=tuple(ordered), contestants=tuple(known.values()))
    return Report(plan, tuple(by_cell[cell] for cell in ordered))


if __name__ == "__main__":
    typer.run(tables)
