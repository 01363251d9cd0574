"""The report of a comparison: a Markdown table and two plots."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from export.comparison.compare import Result

matplotlib.rcParams["svg.hashsalt"] = "concertina"  # the same results give the same file
_FAMILIES = {  # Okabe and Ito's colours, which colour-blind readers can distinguish
    "full": "#000000",
    "fixed": "#0072B2",
    "logsparse": "#009E73",
    "axial": "#D55E00",
    "mixture": "#CC79A7",
}
_MARKS = "osD^vPX*<>"


def write_report(out: Path, results: Sequence[Result], unit: str) -> None:
    """Write `table.md`, `quality.svg` and `cost.svg` to `out`."""
    (out / "table.md").write_text(table(results, unit))
    _save(_quality(results, unit), out / "quality.svg")
    _save(_cost(results), out / "cost.svg")


def table(results: Sequence[Result], unit: str) -> str:
    """One row per variant, best first: mean and spread over its seeds, and the cost of a stream."""
    lines = [
        f"| pattern | {unit} | seeds | weights | trained in | state of a stream, at most | "
        "operations per token |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, runs in _best_first(results):
        bits = [run.bits for run in runs]
        spread = f" ± {statistics.stdev(bits):.3f}" if len(bits) > 1 else ""
        first = runs[0]
        cells = (
            f"`{variant}`",
            f"{statistics.mean(bits):.3f}{spread}",
            f"{len(runs)}",
            f"{first.parameters / 1e6:.3f} M",
            f"{statistics.mean(run.seconds for run in runs):.0f} s",
            f"{first.state_bytes[-1] / 1e3:,.0f} kB",
            f"{first.flops[-1] / 1e6:.2f} M",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _best_first(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    variants = {result.variant for result in results}
    grouped = [(v, [r for r in results if r.variant == v]) for v in variants]
    return sorted(grouped, key=lambda item: statistics.mean(run.bits for run in item[1]))


def _quality(results: Sequence[Result], unit: str) -> Figure:
    figure = Figure(figsize=(11, 5), layout="constrained")
    by_time, by_state = figure.subplots(1, 2)
    for index, (variant, runs) in enumerate(_best_first(results)):
        style = _style(variant, index)
        for number, run in enumerate(runs):
            label = variant if not number else None
            by_time.plot(*zip(*run.curve, strict=True), **style, label=label, markersize=4)
        mean = statistics.mean(run.bits for run in runs)
        by_state.plot(runs[0].state_bytes[-1], mean, **{**style, "linestyle": ""}, label=variant)
    by_time.set(xlabel="seconds of training", ylabel=f"{unit}, held out")
    by_state.set(xlabel="largest state of a stream, bytes", ylabel=unit, xscale="log")
    figure.legend(*by_time.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    _plain(by_time, by_state)
    return figure


def _cost(results: Sequence[Result]) -> Figure:
    figure = Figure(figsize=(11, 5), layout="constrained")
    flops, state = figure.subplots(1, 2)
    for index, (variant, runs) in enumerate(_best_first(results)):
        first, style = runs[0], {**_style(variant, index), "marker": ""}
        flops.plot(first.tokens, first.flops, **style, label=variant)
        state.plot(first.tokens, first.state_bytes, **style)
    flops.set(xlabel="tokens of the stream", ylabel="operations per token so far", xscale="log")
    state.set(xlabel="tokens of the stream", ylabel="bytes of state so far")
    state.set(xscale="log", yscale="log")
    figure.legend(*flops.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    _plain(flops, state)
    return figure


def _style(variant: str, index: int) -> dict[str, object]:
    family = next((name for name in _FAMILIES if name in variant), "axial")
    return {
        "color": _FAMILIES[family],
        "linestyle": _dashes(variant),
        "marker": _MARKS[index % len(_MARKS)],
        "fillstyle": "none" if variant.startswith("sparse") else "full",
        "linewidth": 1.2,
    }


def _dashes(variant: str) -> str:
    if variant.startswith("sparse"):
        return ":"
    if any(part in variant for part in ("mean", "hierarchical", "averaged", "vertical")):
        return "--"
    return "-." if "deepset" in variant or "horizontal" in variant else "-"


def _plain(*panels: Axes) -> None:
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
