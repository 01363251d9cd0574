"""Prompts from files: text, and the rows of an image."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from concertina.client import ImageFormat
from concertina.client.errors import InvalidRequest
from concertina.codecs.image_files import ImageError, open_image
from concertina.codecs.pixels import shown_rows

STDIN = Path("-")


def read_input(path: Path) -> bytes:
    """What a file holds; `-` is standard input."""
    return sys.stdin.buffer.read() if path == STDIN else path.read_bytes()


def text_of(data: bytes, path: Path) -> str:
    """The text in `data`, which is what `path` holds. Raises InvalidRequest if it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{_source(path)} is not UTF-8 text: see byte {error.start}") from None


def read_text(path: Path) -> str:
    """The text of a file; `-` is standard input. Raises InvalidRequest if it is not UTF-8."""
    return text_of(read_input(path), path)


def image_of(data: bytes, path: Path) -> Image.Image:
    """The image in `data`, which is what `path` holds. Raises InvalidRequest if it is none."""
    try:
        return open_image(data)
    except ImageError as error:
        raise InvalidRequest(f"{_source(path)} {error}") from None


def rows_of(image: Image.Image, path: Path, form: ImageFormat) -> Image.Image:
    """The rows of an image down to the last that is not fully transparent, as wide as `form`.

    An image that is a multiple of this width, as `concertina paint` writes it, is scaled down.
    Raises InvalidRequest if it does not fit, or is fully transparent.
    """
    scale, rest = divmod(image.width, form.width)
    if rest or image.height > scale * form.height:
        raise InvalidRequest(
            f"{_source(path)} is {image.width}x{image.height} pixels; the model takes images "
            f"{form.width} wide and at most {form.height} high, or a multiple of both"
        )
    height, rest = divmod(image.height, scale)
    if rest:
        crop = f"crop it to {height * scale}" if height else f"make it {scale}"
        raise InvalidRequest(
            f"{_source(path)} is {image.width}x{image.height} pixels, {scale} times as wide as the "
            f"model's {form.width}, but its height is no multiple of {scale}: {crop} pixels high"
        )
    rows = shown_rows(image.resize((form.width, height), Image.Resampling.NEAREST))
    if rows is None:
        raise InvalidRequest(f"{_source(path)} is wholly transparent: at least one row must show")
    return rows


def _source(path: Path) -> str:
    return "standard input" if path == STDIN else str(path)
