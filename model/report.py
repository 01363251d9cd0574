"""The report of a run: one HTML file with its held-out curve, samples and settings."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

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
_WIDTH, _HEIGHT, _MARGIN = 640, 280, 44
_PARTS = {"model": "Model", "train": "Training", "init": "Begins with", "data": "Data"}
"""The parts of a configuration, and their titles."""
STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15rem 1.5rem .15rem 0; text-align: left; vertical-align: top }
td { border-top: 1px solid #8884; overflow-wrap: anywhere }
pre { white-space: pre-wrap; border-left: 3px solid #8888; padding-left: .8rem }
figure { display: inline-block; margin: 0 .8rem .8rem 0; text-align: center }
img { image-rendering: pixelated; width: 128px; border: 1px solid #8884; display: block }
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
        *(_settings(title, settings[part]) for part, title in _PARTS.items() if part in settings),
    ]
    title = html.escape(folder.resolve().name)
    write_whole(
        folder / REPORT,
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title>\n'
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n",
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
    """Bits against steps, as SVG: held out, and of the batch, fainter; none of one evaluation."""
    if len(log) < 2:
        return ""
    lines = {
        "held out": ("#2B8CCE", 1.0, [(done.step, float(done.heldout or 0)) for done in log]),
        "batch": ("#E08040", 0.7, [(done.step, done.bits) for done in log]),
    }
    ticks = round_numbers([bits for _, _, line in lines.values() for _, bits in line])
    low, high, end = float(ticks[0]), float(ticks[-1]), log[-1].step
    scale = (_HEIGHT - 2 * _MARGIN) / (high - low)

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
    grid = []
    for tick in ticks:
        y = at(0, float(tick)).split(",")[1]
        grid.append(
            f'<path d="M{_MARGIN} {y}H{_WIDTH - _MARGIN}" stroke="currentColor" opacity="0.2"/>'
            f'<text x="{_MARGIN - 6}" y="{y}" dy="4" text-anchor="end" {axis}>{tick}</text>'
        )
    below = f'y="{_HEIGHT - _MARGIN + 20}" {axis}'
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" font-size="13">'
        f"<title>{unit} against steps</title>{''.join(grid)}{''.join(drawn)}"
        f'<text x="{_WIDTH - _MARGIN}" y="16" text-anchor="end" {axis}>{unit}</text>'
        f'<text x="{_MARGIN}" {below}>0</text>'
        f'<text x="{_WIDTH - _MARGIN}" text-anchor="end" {below}>{end:,} steps</text></svg>'
    )


def round_numbers(values: Sequence[float]) -> list[str]:
    """Three to seven round numbers, evenly apart, from below the least value to above the most."""
    low, high = min(values), max(values)
    least = max((high - low) / 5, 1e-4)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= least)
    first, last = math.floor(low / step), math.ceil(high / step)
    digits = max(0, -math.floor(math.log10(step)))
    return [f"{number * step:.{digits}f}" for number in range(first, max(last, first + 1) + 1)]


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
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{label}">'
        f"<figcaption>{label}</figcaption></figure>"
    )


def _settings(title: str, settings: dict[str, Any]) -> str:
    rows = [(name, _value(value)) for name, value in settings.items() if name != "palette"]
    return f"<h3>{title}</h3>" + _table(("setting", "value"), [row for row in rows if row[1]])


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += [(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{''.join(cells)}</tr>" for cells in lines) + "</table>"
