"""The report of a run: one HTML file with its held-out curve, samples and settings."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from model.data import END_OF_TEXT, DatasetInfo, Tokens
from model.run import CONFIG, Checkpoint, Progress, read_log, write_whole

REPORT = "report.html"
_TEMPERATURE = 0.9
_TEXT = 256
_WORK = 1_200_000
"""Most tokens to compute for samples. Without a cache, each new token computes all before it."""
_WIDTH, _HEIGHT, _MARGIN = 640, 260, 44
_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } td, th { padding: .1rem .8rem .1rem 0; text-align: left }
pre { white-space: pre-wrap; border-left: 3px solid #8888; padding-left: .8rem }
img { image-rendering: pixelated; width: 128px; margin: 0 .5rem .5rem 0 }
svg { max-width: 100%; height: auto }
"""


def write_report(folder: Path, info: DatasetInfo, samples: Tokens | None = None) -> None:
    """Write the report of the run in `folder`.

    samples: token ids `[samples, T]`; None if the run is not over, or has none.
    """
    log = [done for done in read_log(folder) if done.heldout is not None]
    settings = json.loads((folder / CONFIG).read_text())
    last = log[-1]
    parts = [
        f"<h1>{html.escape(folder.resolve().name)}</h1>",
        f"<p>Step {last.step:,} of {last.steps:,}: <b>{last.heldout:.4f} {info.unit}</b> held out, "
        f"after {timedelta(seconds=round(last.seconds))} of steps.</p>",
        _curve(log, info.unit),
        _shown(info, samples),
        "<h2>Evaluations</h2>",
        _table(
            ("step", f"{info.unit}, held out", f"{info.unit}, of the batch"),
            ((f"{done.step:,}", f"{done.heldout:.4f}", f"{done.bits:.4f}") for done in log),
        ),
        "<h2>Settings</h2>",
        _table(
            ("setting", "value"),
            (
                (name, f"{value}")
                for part in ("model", "train", "init", "data")
                for name, value in settings.get(part, {}).items()
                if name != "palette"
            ),
        ),
    ]
    title = html.escape(folder.resolve().name)
    write_whole(
        folder / REPORT,
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n",
    )


@torch.no_grad()
def draw_samples(checkpoint: Checkpoint, seed: int = 0) -> Tokens | None:
    """A few samples `[samples, T]`, of images one label after the other.

    A pure function of its arguments. None for a masked model, and for images that take too long.
    """
    config, info = checkpoint.config, checkpoint.data
    length = min(config.context, _TEXT) if info.modality == "text" else config.context
    count = min(4, _WORK * 2 // length**2)
    if config.masked or not count:
        return None
    generator = torch.Generator().manual_seed(seed)
    labels = [1 + number % len(info.labels) if info.labels else 0 for number in range(count)]
    tokens = torch.tensor(labels)[:, None] + config.vocabulary
    for _ in range(length):
        logits = checkpoint.model(tokens)[:, -1].float() / _TEMPERATURE
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens = torch.cat((tokens, drawn), dim=1)
    drawn_ids: Tokens = tokens[:, 1:].numpy()
    return drawn_ids


def _curve(log: Sequence[Progress], unit: str) -> str:
    """Bits against steps, as SVG: held out, and of the batch, fainter."""
    lines = {
        "held out": ("#0072B2", 1.0, [(done.step, float(done.heldout or 0)) for done in log]),
        "batch": ("#D55E00", 0.5, [(done.step, done.bits) for done in log]),
    }
    values = [bits for _, _, line in lines.values() for _, bits in line]
    low, high, end = min(values), max(values), log[-1].step
    scale = (_HEIGHT - 2 * _MARGIN) / ((high - low) or 1.0)

    def at(step: int, bits: float) -> str:
        x = _MARGIN + step / end * (_WIDTH - 2 * _MARGIN)
        return f"{x:.1f},{_HEIGHT - _MARGIN - (bits - low) * scale:.1f}"

    drawn = []
    for number, (name, (colour, opacity, line)) in enumerate(lines.items()):
        points = " ".join(at(*point) for point in line)
        ends = "".join(
            f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>'
            for x, y in (point.split(",") for point in points.split())
        )
        drawn.append(
            f'<g opacity="{opacity}"><polyline points="{points}" fill="none" stroke="{colour}" '
            f'stroke-width="2"/>{ends}<text x="{_MARGIN + 90 * number}" y="16" fill="{colour}">'
            f"{name}</text></g>"
        )
    axis = 'fill="currentColor" font-size="12"'
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" font-size="13">'
        f"<title>{unit} against steps</title>{''.join(drawn)}"
        f'<text x="2" y="{_MARGIN}" {axis}>{high:.3f}</text>'
        f'<text x="2" y="{_HEIGHT - _MARGIN}" {axis}>{low:.3f}</text>'
        f'<text x="{_WIDTH - _MARGIN}" y="{_HEIGHT - 20}" text-anchor="end" {axis}>'
        f"step {end:,}</text></svg>"
    )


def _shown(info: DatasetInfo, samples: Tokens | None) -> str:
    if samples is None:
        return ""
    how = f"<h2>Samples</h2><p>Seed 0, temperature {_TEMPERATURE}, without selection.</p>"
    if info.modality == "text":
        return how + "".join(f"<pre>{html.escape(_text(row))}</pre>" for row in samples)
    return how + "".join(_picture(info, row, number) for number, row in enumerate(samples))


def _text(row: Tokens) -> str:
    return bytes(row.tolist()).split(bytes([END_OF_TEXT]))[0].decode(errors="replace")


def _picture(info: DatasetInfo, row: Tokens, number: int) -> str:
    palette = np.array(info.palette, np.uint8)
    image = Image.fromarray(palette[row].reshape(info.image_height, info.image_width, 3))
    with io.BytesIO() as file:
        image.save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode()
    label = html.escape(info.labels[number % len(info.labels)]) if info.labels else "sample"
    return f'<img src="data:image/png;base64,{data}" alt="{label}" title="{label}">'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += [(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{''.join(cells)}</tr>" for cells in lines) + "</table>"
