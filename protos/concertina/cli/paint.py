"""The command `paint`: paints an image in the terminal as it is generated."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from concertina.cli.canvas import Canvas, Easel
from concertina.cli.connection import Server, choose_model, connected, image_format
from concertina.cli.inputs import image_of, read_input, rows_of
from concertina.cli.options import (
    Json,
    Label,
    MinP,
    ModelName,
    Priority,
    Seed,
    Temperature,
    TimeLimit,
    Timeout,
    TopK,
    TopP,
    png_file,
)
from concertina.cli.output import plain_console
from concertina.cli.printing import EventPrinter
from concertina.client import ImageFormat
from concertina.codecs.image_files import MOST_PIXELS, most_scale
from concertina.codecs.pixels import in_palette, on_white

_FRAMES_PER_SECOND = 12


def paint(
    label: Label = None,
    complete: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Image to complete: its upper rows, or one whose lower rows are transparent.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", dir_okay=False, callback=png_file, help="PNG to write."),
    ] = None,
    scale: Annotated[int, typer.Option(min=1, help="Pixels of the PNG per pixel painted.")] = 8,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    time_limit: TimeLimit = None,
    priority: Priority = None,
    timeout: Timeout = None,
    model: ModelName = "",
    *,
    server: Server,
    json_output: Json = False,
) -> None:
    """Paint an image in the terminal as it is generated.

    If standard output is not a terminal, the finished picture is printed, unless --out saves it.
    With NO_COLOR or TERM=dumb it is shown in shades of characters.

    Examples:
    concertina paint --label "Food & Drink" --seed 7
    concertina paint --out image.png --scale 16
    concertina paint --complete half.png --out whole.png
    """
    with connected(server, json_output) as client:
        chosen = choose_model(client, model, "image")
        size = image_format(chosen)
        if out is not None:
            _check_scale(scale, size)
        canvas = Canvas(size.width, size.height)
        rows = None
        if complete is not None:
            rows = rows_of(image_of(read_input(complete), complete), complete, size)
            canvas.paint(0, in_palette(on_white(rows), size.palette))  # as the server sees them
        stream = client.generate(
            rows,
            model=chosen.name,
            label=label,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            time_limit=time_limit,
            priority=priority,
            timeout=timeout,
        )
        console = plain_console()
        live = console.is_terminal and not json_output
        easel = Easel(canvas, " · ".join(filter(None, (chosen.name, label))))
        easel.fit(console)
        view = Live(easel, console=console, refresh_per_second=_FRAMES_PER_SECOND)
        printer = EventPrinter(json_output)
        with stream, view if live else nullcontext():
            for tokens in printer.tokens(stream):
                canvas.paint(tokens.first_position, tokens.rgb)
    if out is not None:
        canvas.image(scale).save(out, format="PNG")
    elif not live and not json_output:
        canvas.zoom = 1
        _picture_console().print(canvas, end="")
    printer.summarise()


def _check_scale(scale: int, size: ImageFormat) -> None:
    """Raises BadParameter for a PNG that would be too large."""
    most = most_scale(size.width, size.height)
    if scale > most:
        raise typer.BadParameter(
            f"{scale} times {size.width}x{size.height} pixels are more than {MOST_PIXELS:,}: "
            f"use at most {most}",
            param_hint="--scale",
        )


def _picture_console() -> Console:
    return Console(force_terminal=True, color_system="truecolor", markup=False, emoji=False)
