"""An image while it is painted: pixels in raster order, shown in a terminal, saved as PNG."""

from __future__ import annotations

import itertools
from functools import cache
from time import perf_counter

import numpy as np
from PIL import Image
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.panel import Panel
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

_SHADES = " .:-=+*#%@"
_LARGEST_ZOOM = 16  # however large a terminal says that it is
_FRAME = 6  # lines and columns that the border and the shell's prompt use


class Canvas:
    """A picture of `width` x `height` pixels that fills up. Rich shows two rows of it per line.

    Where there are no colours (NO_COLOR, TERM=dumb), characters are shades: white is blank.
    zoom: columns of the terminal per pixel.
    """

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.height = height
        self.zoom = 1
        self.painted = 0
        self._rgba = bytearray(4 * width * height)

    @property
    def pixels(self) -> int:
        """Pixels of the finished picture."""
        return self.width * self.height

    def paint(self, position: int, rgb: bytes) -> None:
        """Sets the pixels from `position` on, in raster order; `rgb` has three bytes for each.

        Raises ValueError if they do not fit.
        """
        end = position + len(rgb) // 3
        if end > self.pixels:
            raise ValueError(f"pixel {end} is outside an image of {self.width}x{self.height}")
        for channel in range(3):
            self._rgba[4 * position + channel : 4 * end : 4] = rgb[channel::3]
        self._rgba[4 * position + 3 : 4 * end : 4] = b"\xff" * (end - position)
        self.painted += end - position

    def image(self, scale: int = 1) -> Image.Image:
        """The picture, `scale` times as large; pixels not painted yet are transparent."""
        image = Image.frombytes("RGBA", (self.width, self.height), bytes(self._rgba))
        return image.resize((scale * self.width, scale * self.height), Image.Resampling.NEAREST)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(self.zoom * self.width, self.zoom * self.width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        image = self.image(self.zoom)
        data, stride = image.tobytes(), 4 * image.width
        rows = [data[start : start + stride] for start in range(0, len(data), stride)]
        for upper, lower in itertools.zip_longest(rows[::2], rows[1::2], fillvalue=bytes(stride)):
            if not shows_colours(console):
                yield Segment(_shades(upper, lower))
                yield Segment.line()
                continue
            cells = ((upper[x : x + 4], lower[x : x + 4]) for x in range(0, stride, 4))
            for (top, bottom), run in itertools.groupby(cells):
                block, style = _cell(top, bottom)
                yield Segment(block * len(list(run)), style)
            yield Segment.line()


class Easel:
    """A framed canvas with its progress, as large as the terminal allows."""

    def __init__(self, canvas: Canvas, title: str) -> None:
        self._canvas = canvas
        self._title = title
        self._before = canvas.painted
        self._started = perf_counter()

    def fit(self, console: Console) -> None:
        """Sets the largest zoom, up to a limit, at which the frame fits into the terminal."""
        columns = (console.width - _FRAME) // self._canvas.width
        lines = 2 * (console.height - _FRAME) // self._canvas.height
        self._canvas.zoom = max(1, min(columns, lines, _LARGEST_ZOOM))

    def __rich__(self) -> Panel:
        canvas = self._canvas
        rate = (canvas.painted - self._before) / (perf_counter() - self._started)
        return Panel(
            canvas,
            title=Text(self._title),
            subtitle=f"{canvas.painted}/{canvas.pixels} pixels · {rate:.0f}/s",
            border_style="dim",
            expand=False,
        )


def shows_colours(console: Console) -> bool:
    """Whether a console has colours, and its user wants them."""
    return not (console.no_color or console.is_dumb_terminal or console.color_system is None)


def _shades(upper: bytes, lower: bytes) -> str:
    """One character for each two pixels above each other, the denser the darker they are."""
    pixels = np.frombuffer(upper + lower, np.uint8).reshape(2, -1, 4).astype(np.int64)
    ink = (255_000 - pixels[:, :, :3] @ np.array([299, 587, 114])) * (pixels[:, :, 3] > 0)
    steps = ink.sum(axis=0) * len(_SHADES) // (2 * 255_000 + 1)
    return "".join(_SHADES[step] for step in steps)


@cache
def _cell(top: bytes, bottom: bytes) -> tuple[str, Style | None]:
    """Character and style that show two pixels, `[red, green, blue, alpha]`, above each other."""
    match bool(top[3]), bool(bottom[3]):
        case True, True:
            return "▀", Style(color=_colour(top), bgcolor=_colour(bottom))
        case True, False:
            return "▀", Style(color=_colour(top))
        case False, True:
            return "▄", Style(color=_colour(bottom))
    return " ", None


def _colour(pixel: bytes) -> Color:
    return Color.from_rgb(*pixel[:3])
