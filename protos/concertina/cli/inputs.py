"""Prompts from files: text, and the rows of an image."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from concertina.client.errors import InvalidRequest
from concertina.codecs.pixels import open_rgba, shown_rows


def read_text(path: Path) -> str:
    """The text of a file; `-` is standard input. Raises InvalidRequest if it is not UTF-8."""
    source = "standard input" if path == Path("-") else str(path)
    data = sys.stdin.buffer.read() if path == Path("-") else path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{source} is not UTF-8 text: see byte {error.start}") from None


def read_rows(path: Path, width: int, height: int) -> Image.Image:
    """The rows of an image file down to the last that is not fully transparent, `width` wide.

    An image that is a multiple of this width, as `concertina paint` writes it, is scaled down.
    Raises InvalidRequest for a file that is no image, does not fit, or is fully transparent.
    """
    try:
        image = open_rgba(path)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read as an image: {error}") from None
    scale, rest = divmod(image.width, width)
    if rest or image.height > scale * height:
        raise InvalidRequest(
            f"{path} is {image.width}x{image.height} pixels; the model takes images {width} wide "
            f"and at most {height} high, or a multiple of both"
        )
    image = image.resize((width, max(1, image.height // scale)), Image.Resampling.NEAREST)
    rows = shown_rows(image)
    if rows is None:
        raise InvalidRequest(f"{path} is wholly transparent: at least one row must show")
    return rows
