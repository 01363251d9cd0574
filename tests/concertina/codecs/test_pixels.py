"""Images as rows of pixels, pixels as colours of a palette: each against its plain definition."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from concertina.codecs.pixels import (
    in_palette,
    is_image,
    nearest,
    on_white,
    open_png,
    open_rgba,
    shown_rows,
)

RNG = np.random.default_rng(5)


def rgba(rows: list[list[tuple[int, int, int, int]]]) -> Image.Image:
    return Image.fromarray(np.array(rows, np.uint8), "RGBA")


def test_nearest_is_the_first_of_the_closest() -> None:
    colours = RNG.integers(0, 256, (300, 3)).astype(np.uint8)
    palette = RNG.integers(0, 256, (16, 3)).astype(np.uint8)
    palette[9] = palette[3]

    def closest(colour: list[int]) -> int:
        entries = palette.tolist()
        return min(
            range(len(entries)),
            key=lambda i: sum((a - b) ** 2 for a, b in zip(entries[i], colour, strict=True)),
        )

    expected = [closest(colour) for colour in colours.tolist()]
    assert nearest(colours, palette.tobytes()).tolist() == expected
    assert in_palette(colours, palette.tobytes()) == palette[expected].tobytes()
    assert nearest(np.array([[1, 0, 0]], np.uint8), bytes([2, 0, 0, 0, 0, 0])).tolist() == [0]


def test_opposite_colours_do_not_overflow() -> None:
    palette = bytes([255, 255, 255, 0, 0, 0])
    assert nearest(np.array([[0, 0, 0], [255] * 3], np.uint8), palette).tolist() == [1, 0]


def test_transparency_lies_on_white() -> None:
    image = rgba([[(10, 20, 30, 255), (10, 20, 30, 0)], [(0, 0, 0, 128), (255, 0, 0, 64)]])
    opaque, clear, half, quarter = on_white(image).tolist()
    assert opaque == [10, 20, 30]
    assert clear == [255, 255, 255]
    assert half == [127, 127, 127]
    assert quarter == [255, 191, 191]


@pytest.mark.parametrize(
    ("alphas", "rows"),
    [([255, 255, 255], 3), ([255, 0, 0], 1), ([0, 1, 0], 2), ([0, 0, 0], None)],
)
def test_rows_end_with_the_last_that_shows(alphas: list[int], rows: int | None) -> None:
    image = rgba([[(9, 9, 9, 0), (9, 9, 9, alpha)] for alpha in alphas])
    shown = shown_rows(image)
    assert (shown and shown.size) == (rows and (2, rows))


def test_a_png_is_not_decoded_before_it_is_used() -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "PNG")
    cut = file.getvalue()[:60]
    opened = open_png(cut)
    assert opened.size == (40, 30)
    with pytest.raises((OSError, SyntaxError)):
        opened.convert("RGBA")


def test_a_png_that_claims_to_be_huge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombWarning):
        open_png(file.getvalue())


def test_other_formats_are_no_png(tmp_path: Path) -> None:
    path = tmp_path / "image.bmp"
    Image.new("RGB", (2, 1), "red").save(path)
    with pytest.raises(OSError):
        open_png(path.read_bytes())
    assert open_rgba(path).tobytes() == bytes([255, 0, 0, 255] * 2)
    assert is_image(path)
    text = tmp_path / "text"
    text.write_text("text")
    assert not is_image(text)
    assert not is_image(tmp_path / "missing")
    with pytest.raises(OSError):
        open_rgba(text)
