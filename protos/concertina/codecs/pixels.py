"""Images as whole rows of pixels, and pixels as the colours of a palette."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError


def open_png(data: bytes) -> Image.Image:
    """The PNG in `data`. Only its header is read, so its size can be checked before it is decoded.

    Raises an exception of any class if it is not a PNG, or claims to be huge.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=["PNG"])


def open_rgba(path: Path) -> Image.Image:
    """The image in a file of any format, as RGBA. Raises OSError if it cannot be read."""
    return Image.open(path).convert("RGBA")


def is_image(path: Path) -> bool:
    """Whether a file is an image, by its header."""
    try:
        with Image.open(path):
            return True
    except (FileNotFoundError, UnidentifiedImageError):
        return False


def shown_rows(rgba: Image.Image) -> Image.Image | None:
    """The rows of an RGBA image down to the last that shows; None if it is wholly transparent."""
    box = rgba.getchannel("A").getbbox()
    return None if box is None else rgba.crop((0, 0, rgba.width, box[3]))


def on_white(rgba: Image.Image) -> npt.NDArray[np.uint8]:
    """Colours `[height * width, 3]` of an RGBA image that lies on white."""
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    return np.asarray(white)[:, :, :3].reshape(-1, 3)


def nearest(colours: npt.NDArray[np.uint8], palette: bytes) -> npt.NDArray[np.int64]:
    """The index in `palette`, three bytes per entry, of the colour nearest to each `[n, 3]`.

    Nearest by the sum of squared differences; of several, the first.
    """
    entries = np.frombuffer(palette, np.uint8).reshape(-1, 3).astype(np.int64)
    distances = ((colours[:, None].astype(np.int64) - entries) ** 2).sum(axis=2)
    indices: npt.NDArray[np.int64] = distances.argmin(axis=1)
    return indices


def in_palette(colours: npt.NDArray[np.uint8], palette: bytes) -> bytes:
    """Colours `[n, 3]`, each replaced by the nearest of `palette`: three bytes each."""
    return np.frombuffer(palette, np.uint8).reshape(-1, 3)[nearest(colours, palette)].tobytes()
