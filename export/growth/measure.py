"""How training memory and the state of a stream grow with length, by bytes that are allocated.

Training is one forward and backward of one attention layer, with many heads: the memory of few over
a short sequence drowns in noise. Streams go through a bundle's graphs, and a copy of their live
state is weighed. Exit code 1 when a pattern materialises L x L, or a state is not as large as the
manifest says.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from export.growth.plots import draw_state, draw_training
from export.growth.streams import Sample, measure_streams
from export.growth.training import Peak, measure_training
from model.patterns import PATTERNS

QUADRATIC = 1.9
"""Patterns whose training memory grows with an exponent of this or more hold an L x L matrix."""


def exponents(peaks: Iterable[Peak]) -> dict[str, float]:
    """Slope of log(peak) over log(length), by pattern."""
    by_pattern: dict[str, list[Peak]] = {}
    for peak in peaks:
        by_pattern.setdefault(peak.pattern, []).append(peak)
    return {
        name: slope([p.length for p in own], [p.bytes for p in own])
        for name, own in by_pattern.items()
    }


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent of a power law, by least squares."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def fit_streams(samples: Sequence[Sample]) -> dict[str, float]:
    """Exponents of fixed and full; of hierarchical a + b log2(pushed + 1) bytes at 2^k - 1."""
    fixed, full, hierarchical = (
        [(s.pushed + 1, s.allocated) for s in samples if s.attention == name and s.allocated]
        for name in ("fixed", "full", "logsparse-hierarchical")
    )
    peaks = [(math.log2(end), size) for end, size in hierarchical if end.bit_count() == 1]
    bits, sizes = zip(*peaks, strict=True)
    b, a = np.polyfit(bits, sizes, 1)
    return {
        "fixed_exponent": slope(*zip(*fixed, strict=True)),
        "full_exponent": slope(*zip(*full, strict=True)),
        "hierarchical_a": float(a),
        "hierarchical_b": float(b),
        "hierarchical_worst_residual": float(np.abs(a + b * np.array(bits) - sizes).max()),
    }


def complaints(slopes: Mapping[str, float], samples: Iterable[Sample]) -> list[str]:
    """What is not as it has to be, one sentence each."""
    return [
        f"{name}: training memory grows with L^{slope:.2f}, and L^{QUADRATIC} is the limit: "
        "look for an L x L matrix in its forward"
        for name, slope in slopes.items()
        if slope >= QUADRATIC
    ] + [
        f"{s.attention}, context {s.context}: {s.allocated} bytes after {s.pushed} tokens, and "
        f"state_bytes says {s.expected}: one of them is wrong"
        for s in samples
        if s.allocated not in (None, s.expected)
    ]


def report(peaks: Sequence[Peak], samples: Sequence[Sample]) -> str:
    """Both measurements as Markdown tables."""
    slopes, fits = exponents(peaks), fit_streams(samples)
    lengths = sorted({peak.length for peak in peaks})
    lines = [
        "| pattern | " + " | ".join(f"MB at {n:,}" for n in lengths) + " | exponent |",
        "|---" * (len(lengths) + 2) + "|",
    ]
    for name, exponent in slopes.items():
        sizes = [f"{peak.bytes / 1e6:.1f}" for peak in peaks if peak.pattern == name]
        note = " **L x L**" if exponent >= QUADRATIC else ""
        lines.append(f"| {name} | {' | '.join(sizes)} | {exponent:.2f}{note} |")
    contexts = sorted({s.context for s in samples if s.attention == "fixed"})
    lines += ["", "| tokens pushed | fixed | full | logsparse-hierarchical |", "|---|---|---|---|"]
    for context in contexts:
        by_name = {s.attention: s for s in samples if s.pushed == context - 1}
        cells = [
            f"{by_name[name].expected:,} B" + ("" if by_name[name].allocated else " (computed)")
            for name in ("fixed", "full", "logsparse-hierarchical")
        ]
        lines.append(f"| {context - 1:,} | {' | '.join(cells)} |")
    lines += [
        "",
        f"fixed: exponent {fits['fixed_exponent']:.3f}; "
        f"full: exponent {fits['full_exponent']:.3f}; logsparse-hierarchical at 2^k - 1: "
        f"{fits['hierarchical_a']:.1f} + {fits['hierarchical_b']:.1f} log2(tokens + 1) bytes, "
        f"at most {fits['hierarchical_worst_residual']:.1f} off",
    ]
    return "\n".join(lines)


def write_figures(path: Path, peaks: Sequence[Peak], samples: Sequence[Sample]) -> None:
    """Write what was measured, and what follows from it, as JSON."""
    figures = {
        "training": [asdict(peak) for peak in peaks],
        "training_exponents": exponents(peaks),
        "streams": [asdict(sample) for sample in samples],
        "stream_fits": fit_streams(samples),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")


def draw(folder: Path, peaks: Sequence[Peak], samples: Sequence[Sample]) -> None:
    """Draw both pictures, as SVG."""
    curves: dict[str, list[tuple[int, int]]] = {}
    for peak in peaks:
        curves.setdefault(peak.pattern, []).append((peak.length, peak.bytes))
    measured: dict[str, list[tuple[int, int]]] = {}
    computed: dict[str, list[tuple[int, int]]] = {}
    scattered: dict[str, list[tuple[int, int]]] = {}
    for s in samples:
        at_end = (s.pushed + 1).bit_count() == 1
        kind = computed if s.allocated is None else measured if at_end else scattered
        kind.setdefault(s.attention, []).append((s.pushed, s.allocated or s.expected))
    folder.mkdir(parents=True, exist_ok=True)
    draw_training(folder / "training-memory.svg", curves, exponents(peaks))
    draw_state(folder / "state-growth.svg", measured, computed, scattered)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m export.growth.measure",
        description=(__doc__ or "").partition("\n")[0],
        epilog="example: python -m export.growth.measure --lengths 1024 4096 --contexts 1024 4096",
    )
    add = parser.add_argument
    add("--json", type=Path, default=Path("build/growth.json"), help="where the figures go")
    add("--images", type=Path, default=Path("docs/images"), help="folder of both pictures")
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=[4**k for k in (5, 6, 7)],
        metavar="L",
        help="lengths of training, squares",
    )
    add(
        "--contexts",
        type=int,
        nargs="+",
        default=[4**k for k in range(5, 11)],
        metavar="L",
        help="contexts of streams, powers of 4",
    )
    add("--heads", type=int, default=16, help="heads of the layer that is trained")
    options = parser.parse_args()
    peaks = measure_training(PATTERNS, options.lengths, options.heads)
    samples = measure_streams(options.contexts)
    write_figures(options.json, peaks, samples)
    draw(options.images, peaks, samples)
    print(report(peaks, samples))
    wrong = complaints(exponents(peaks), samples)
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
