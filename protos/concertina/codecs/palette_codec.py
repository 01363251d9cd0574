"""The codec of models whose tokens are pixels: indices of a palette, in raster order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from concertina.codecs.image_files import ImageError, ImageTooLarge, open_image
from concertina.codecs.pixels import colours_at, nearest, on_white, shown_rows
from concertina.codecs.prompt_error import PromptError
from concertina.codecs.starts import LabelStarts
from concertina.codecs.token_text import Ids, TokenText


@dataclass(frozen=True)
class PaletteCodec:
    """See Codec. width, height: of the image, in pixels. palette: three bytes for each token."""

    starts: LabelStarts
    width: int
    height: int
    palette: bytes

    takes = frozenset({"image"})
    makes = "images"
    writes_text = False
    is_bytewise = False

    @property
    def size(self) -> int:
        return self.starts.vocabulary

    @property
    def complete_at(self) -> int:
        return self.width * self.height

    @cached_property
    def text(self) -> TokenText:
        return TokenText((b"",) * self.size)

    def from_text(self, text: str) -> Ids:
        raise PromptError("text", f"was given, but {self.starts.model} makes images: give an image")

    def from_png(self, png: bytes) -> Ids:
        """The rows down to the last that is not fully transparent, on white."""
        try:
            rgba = open_image(png, ("PNG",), most_pixels=self.complete_at)
            size = rgba.size
        except ImageTooLarge as error:
            size = error.size
        except ImageError as error:
            raise _wrong_png(f"has {len(png)} bytes and {error}") from None
        if size[0] != self.width or size[1] > self.height:
            raise _wrong_png(
                f"is {size[0]}x{size[1]} pixels; {self.starts.model} takes images {self.width} "
                f"wide and at most {self.height} high"
            )
        rows = shown_rows(rgba)
        if rows is None:
            raise _wrong_png("is wholly transparent: at least 1 row must show")
        return nearest(on_white(rows), self.palette)

    def from_rgb(self, rgb: bytes) -> Ids:
        row = 3 * self.width
        if not rgb or len(rgb) % row or len(rgb) > row * self.height:
            raise PromptError(
                "image.rgb",
                f"has {len(rgb)} bytes; {self.starts.model} takes 1 to {self.height} rows "
                f"of {row} bytes",
            )
        return nearest(np.frombuffer(rgb, np.uint8).reshape(-1, 3), self.palette)

    def rgb(self, tokens: Iterable[int]) -> bytes:
        return colours_at(tokens, self.palette)


def _wrong_png(message: str) -> PromptError:
    return PromptError("image.png", message)
