"""The report of an uptraining: one HTML file."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from model.report import REPORT, STYLE
from model.run import write_whole
from model.uptraining.choose import LayerErrors
from model.uptraining.compared import TITLES, Comparison, verdict

_QUARTERS = ("first", "second", "third", "last")


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
        _table(("", "tokens", "digits right", "cases"), _keys(found)),
        "<p>The key stands in the first half of the text, and is asked for at its end.</p>",
        "<h2>Layers</h2>",
        _table(("layer", "attention", "window", "folded", "fitted"), layers),
        "<p>By how much the output of attention changes, squared, relative to its size.</p>",
    ]
    write_whole(
        folder / REPORT,
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{html.escape(folder.resolve().name)}</title><style>{STYLE}</style>"
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


def _keys(found: Comparison) -> Iterable[Sequence[str]]:
    for each in found.measured:
        for keys in each.keys:
            yield (
                TITLES[each.variant],
                f"{keys.length:,}",
                f"{keys.digits_right:.2f}",
                str(keys.cases),
            )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
