"""One HTML page of a run or a sweep, which needs nothing else: no script, no font, no network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, Final

from loadtest.reports.chart import Chart, draw
from loadtest.reports.report import Report
from loadtest.reports.tables import SWEEP_COLUMNS, cells, latencies, sweep_row, totals
from loadtest.sweep import Axis, Point

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto;
  max-width: 1020px; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin-top: 2rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1.2rem }
.charts svg { width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .9rem .2rem 0; text-align: right; border-bottom: 1px solid #e4e4e4 }
td:first-child, th:first-child, .totals td { text-align: left }
.warning { background: #fdecea; border-left: 4px solid #d1495b; padding: .6rem .9rem }
.knee { background: #eef5fb; border-left: 4px solid #1b6ca8; padding: .6rem .9rem }
pre { overflow: auto; font-size: 12px; background: #f6f6f6; padding: .8rem }
.scroll { overflow-x: auto }
"""


def page(
    title: str,
    charts: Sequence[Chart],
    axis: Axis | None,
    points: Sequence[Point],
    *,
    knee: str,
    warnings: Sequence[str],
    told: dict[str, Any],
) -> str:
    """The page. told: what `--json` writes, which the page holds as well."""
    pictures = "".join(draw(chart) for chart in charts)
    body = [
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="warning">{escape(warning)}</p>' for warning in warnings),
        f'<p class="knee">{escape(knee)}</p>' if knee else "",
        f'<div class="charts">{pictures}</div>' if pictures else "",
    ]
    if axis is not None:
        rows = [[point.label, *sweep_row(point)] for point in points]
        body += ["<h2>Points</h2>", _table([str(axis), *SWEEP_COLUMNS], rows)]
        body.append("<p>Latencies are in milliseconds, state in bytes.</p>")
    else:
        body += _numbers(points[0].report)
    data = escape(json.dumps(told, indent=1, ensure_ascii=False))
    body.append(f"<h2>Data</h2><details><summary>JSON</summary><pre>{data}</pre></details>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _numbers(report: Report) -> list[str]:
    rows = [[name, *cells(times)] for name, times in latencies(report)]
    return [
        "<h2>Latencies</h2>",
        _table(["ms", "p50", "p90", "p99", "p99.9", "max"], rows),
        "<h2>Totals</h2>",
        _table([], ([name, text] for name, text in totals(report)), kind="totals"),
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}">'
        f"{f'<tr>{top}</tr>' if head else ''}{lines}</table></div>"
    )
