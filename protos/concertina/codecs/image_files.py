"""Images from files of any usual format, as a viewer shows them: upright, 8 bits, with alpha."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MOST_PIXELS = 1 << 26
"""Pixels of the largest image that is read or written: 256 MiB while it is in memory."""

_ORIENTATION = 0x0112
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH = 24
_LONGEST_REASON = 100
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that cannot be used. The message goes on after the name of the image."""


class ImageTooLarge(ImageError):
    """An image of more pixels than the limit: it is not decoded. size: width and height."""

    def __init__(self, size: tuple[int, int], most_pixels: int) -> None:
        self.size = size
        pixels = size[0] * size[1]
        super().__init__(
            f"is {size[0]}x{size[1]} pixels, {pixels:,} in all; the limit is {most_pixels:,}"
        )


def open_image(
    data: bytes, formats: tuple[str, ...] = FORMATS, most_pixels: int = MOST_PIXELS
) -> Image.Image:
    """The image in `data`, the first one if it is animated, as RGBA and upright (EXIF).

    Integers of 16 bits lose their lower 8; floating-point grey lies between 0 and 1. Raises
    ImageError if it cannot be read, ImageTooLarge if it claims more pixels than `most_pixels`.
    """
    name = formats[0] if len(formats) == 1 else f"image ({', '.join(formats)})"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about what a viewer would not mention
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
            name = image.format or name
            if image.width * image.height > most_pixels:
                raise ImageTooLarge(image.size, most_pixels)
            image.load()
            rgba = _rgba(image, data[_PNG_DEPTH] if data.startswith(_PNG) else 8)
        except ImageError:
            raise
        except Image.DecompressionBombError:
            raise ImageError(f"has more pixels than the limit of {most_pixels:,}") from None
        except Exception as error:  # Pillow's decoders raise errors of many types
            told = isinstance(error, OSError) and not isinstance(error, UnidentifiedImageError)
            reason = f": {error}"[:_LONGEST_REASON] if told else ""
            raise ImageError(f"is not a readable {name}{reason}") from None
        method = _UPRIGHT.get(_orientation(image))
    rgba.info.clear()  # what it says of orientation must not be obeyed again
    return rgba if method is None else rgba.transpose(method)


def most_scale(width: int, height: int) -> int:
    """How many times an image may be enlarged until it has more than `MOST_PIXELS`; 0 if it has."""
    return math.isqrt(MOST_PIXELS // (width * height))


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # a viewer shows an image whose EXIF is broken all the same
        return None


def _rgba(image: Image.Image, png_depth: int) -> Image.Image:
    """A decoded image as RGBA. Pillow clips what has more than 8 bits instead of scaling it."""
    clear = image.info.get("transparency")
    if image.mode == "LAB":
        raise ImageError("is in the colour space LAB: save it as RGB")
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        return _grey(_high_byte(values), None if clear is None else values == clear)
    if image.mode in ("1", "L") and isinstance(clear, int):  # Pillow scales pixels, but not `clear`
        top = 1 if image.mode == "1" else (1 << min(png_depth, 8)) - 1
        grey = np.asarray(image.convert("L"))
        return _grey(grey, grey == (clear & top) * 255 // top)
    if image.mode == "RGB" and isinstance(clear, tuple) and png_depth == 16:
        # The pixels' lower bytes are gone, so colours that differ only there are clear as well.
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    return image.convert("RGBA")


def _high_byte(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Grey `[height, width]` in 8 bits, from 16-bit integers or floats between 0 and 1.

    Raises ImageError if there are others, whose white is not known.
    """
    floats = values.dtype.kind == "f"
    white = 1 if floats else 0xFFFF
    if not ((values >= 0) & (values <= white)).all():
        raise ImageError(
            f"has grey values from {values.min():g} to {values.max():g}, but black is 0 and white "
            f"is {white}: save it with 8 or 16 bits"
        )
    scaled = np.rint(values * 255) if floats else values.astype(np.uint16) >> 8
    return np.asarray(scaled, np.uint8)


def _grey(grey: npt.NDArray[np.uint8], clear: npt.NDArray[np.bool_] | None) -> Image.Image:
    rgba = np.repeat(grey[:, :, None], 4, axis=2)
    rgba[:, :, 3] = 255 if clear is None else np.where(clear, 0, 255)
    return Image.fromarray(rgba)
