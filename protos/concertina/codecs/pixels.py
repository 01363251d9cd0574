"""Pixels of an image, and the indices of a palette that stand for them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from PIL import Image

Colours = npt.NDArray[np.uint8]
"""Colours `[n, 3]`: red, green, blue."""

_AT_ONCE = 1 << 13


def shown_rows(rgba: Image.Image) -> Image.Image | None:
    """The rows of an RGBA image down to the last that shows; None if it is wholly transparent."""
    box = rgba.getchannel("A").getbbox()
    return None if box is None else rgba.crop((0, 0, rgba.width, box[3]))


def on_white(rgba: Image.Image) -> Colours:
    """Colours `[height * width, 3]` of an RGBA image that lies on white, rounded to the nearest."""
    pixels = np.asarray(rgba).reshape(-1, 4)
    if (pixels[:, 3] == 255).all():  # most are: a photograph needs no room for more than itself
        return np.ascontiguousarray(pixels[:, :3])
    missing = (255 - pixels[:, :3]).astype(np.uint16) * pixels[:, 3:]
    return np.asarray(255 - (missing + 127) // 255, np.uint8)


def palette_colours(palette: bytes) -> Colours:
    """The colours of a palette, which has three bytes for each."""
    return np.frombuffer(palette, np.uint8).reshape(-1, 3)


def nearest(colours: Colours, palette: bytes) -> npt.NDArray[np.int64]:
    """The index in `palette` of the colour nearest to each of `colours`.

    Nearest is the smallest sum of squared differences of red, green and blue; of several colours
    that are as near, the first.
    """
    packed, back = np.unique(
        colours.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32), return_inverse=True
    )
    distinct = np.stack((packed >> 16, packed >> 8 & 255, packed & 255), axis=1)
    # |c - p|² without |c|², which all entries share: integers below 2**24, so float32 is exact.
    entries = palette_colours(palette).astype(np.float32)
    lengths = (entries**2).sum(axis=1)
    indices = [
        (lengths - distinct[at : at + _AT_ONCE].astype(np.float32) @ (2 * entries.T)).argmin(axis=1)
        for at in range(0, len(distinct), _AT_ONCE)
    ]
    return np.concatenate(indices or [np.zeros(0, np.int64)])[back]


def colours_at(indices: Iterable[int], palette: bytes) -> bytes:
    """The colours of `palette` at these indices, three bytes each."""
    return palette_colours(palette)[list(indices)].tobytes()


def in_palette(colours: Colours, palette: bytes) -> bytes:
    """Each of `colours` replaced by the nearest of `palette`, three bytes each."""
    return palette_colours(palette)[nearest(colours, palette)].tobytes()
