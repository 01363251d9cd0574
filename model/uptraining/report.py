"""The report of an uptraining: one HTML file."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from model.report import REPORT, STYLE
from model.run import write_whole
from model.uptraining.choose import LayerErrors
from model.uptraining.compared import TITLES, Comparison, Measured, verdict
from model.uptraining.keys import DEPTHS

_NONE = "·"
_QUARTERS = ("first", "second", "third", "last")
_STYLE = """
body { max-width: 60rem }
figure { text-align: left; margin-right: 1.5rem }
.heat td { padding: .3rem .7rem; text-align: center; border: 2px solid Canvas }
.heat th { padding: .1rem .7rem; text-align: center; font-weight: normal }
.numbers td + td, .numbers th + th { text-align: right }
"""


def write_report(
    folder: Path, kinds: Sequence[str], errors: Sequence[LayerErrors], found: Comparison
) -> None:
    """Write the report of the run in `folder`, whose layers attend in these `kinds`."""
    layers = (
        (str(n), kind, f"{each.window:.4f}", f"{each.tangent:.4f}", f"{each.fitted:.4f}")
        for n, (kind, each) in enumerate(zip(kinds, errors, strict=True))
    )
    parts = [
        f"<h1>{html.escape(folder.resolve().name)}</h1>",
        f"<p><b>{html.escape(verdict(found))}.</b></p>",
        "<h2>Loss on held-out text, nats a token</h2>",
        _table(("", "state", "tokens", *_QUARTERS, "all"), _losses(found)),
        "<p>Quarters are those of the text by position. State is the share of full attention's in "
        "the whole context.</p>",
        "<h2>Pass keys found again</h2>",
        *(_heat_map(each) for each in found.measured),
        "<p>Share of the digits that are right, for "
        f"{found.measured[0].keys[0].cases} keys of each length. A text tells five, one at each "
        "depth, and ends with one of them, all in turn.</p>",
        "<h2>State of a stream, and its next token</h2>",
        _table(("", "tokens", "entries, full", "others", "MB", "ms"), _sizes(found)),
        "<p>Entries of a layer with full attention, and of one of the others. State is in float32; "
        "times are of one stream in PyTorch, on this machine: a server is faster.</p>",
        "<h2>Layers</h2>",
        _table(("layer", "attention", "window", "folded", "fitted"), layers),
        "<p>By how much the output of attention changes, squared, relative to its size.</p>",
    ]
    write_whole(
        folder / REPORT,
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{html.escape(folder.resolve().name)}</title><style>{STYLE}{_STYLE}</style>"
        + "\n".join(parts)
        + "</html>\n",
    )


def _losses(found: Comparison) -> Iterable[Sequence[str]]:
    for each in found.measured:
        for loss in each.losses:
            yield (
                TITLES[each.variant],
                f"{each.share:.3f}",
                f"{loss.length:,}",
                *(f"{part:.3f}" for part in loss.parts),
                f"{loss.mean:.3f}",
            )


def _heat_map(measured: Measured) -> str:
    """A row for each length, and a column for each depth; the fuller, the darker."""
    heads = "".join(f"<th>{depth:.0%}</th>" for depth in DEPTHS)
    rows = "".join(
        f"<tr><th>{keys.length:,}</th>{''.join(map(_cell, keys.by_depth))}"
        f"<th>{keys.digits_right:.2f}</th></tr>"
        for keys in measured.keys
    )
    return (
        f"<figure><figcaption>{TITLES[measured.variant]}</figcaption>"
        f'<table class="heat"><tr><th></th>{heads}<th>all</th></tr>{rows}</table></figure>'
    )


def _cell(right: float) -> str:
    return f'<td style="background: rgb(43 140 206 / {right:.2f})">{right:.2f}</td>'


def _sizes(found: Comparison) -> Iterable[Sequence[str]]:
    folding = found.window.architecture.folding
    assert folding is not None
    for each in found.measured:
        if each.variant == "swapped":  # as large as what is fitted
            continue
        for kept in each.sizes:
            kinds = zip(folding.layers, kept.entries, strict=True)
            by_kind = {kind == "full": entries for kind, entries in kinds}
            yield (
                TITLES[each.variant],
                f"{kept.length:,}",
                *(f"{by_kind[full]:,}" if full in by_kind else _NONE for full in (True, False)),
                f"{kept.bytes / 1e6:.1f}",
                _NONE if math.isnan(kept.step_seconds) else f"{1000 * kept.step_seconds:.1f}",
            )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    return f'<table class="numbers"><tr>{head}</tr>{body}</table>'
