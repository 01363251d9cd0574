"""Pixels as colours of a palette and back: each against its plain definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from concertina.codecs.pixels import colours_at, in_palette, nearest, on_white, shown_rows

Colour = tuple[int, ...]

channel = st.integers(0, 255)
colour = st.tuples(channel, channel, channel)
# Few values, so that distances are often the same.
coarse = st.tuples(*3 * [st.sampled_from([0, 1, 2, 127, 128, 254, 255])])


def array(colours: list[Colour]) -> np.ndarray:
    return np.array(colours, np.uint8).reshape(-1, 3)


def closest(one: Colour, palette: list[Colour]) -> int:
    def distance(index: int) -> int:
        return sum((a - b) ** 2 for a, b in zip(one, palette[index], strict=True))

    return min(range(len(palette)), key=distance)  # min takes the first of equals


def rgba(rows: list[list[Colour]]) -> Image.Image:
    return Image.fromarray(np.array(rows, np.uint8), "RGBA")


@given(st.lists(colour | coarse, max_size=40), st.lists(colour | coarse, min_size=1, max_size=40))
def test_nearest_is_the_first_of_the_closest(colours: list[Colour], palette: list[Colour]) -> None:
    expected = [closest(one, palette) for one in colours]
    packed = array(palette).tobytes()
    assert nearest(array(colours), packed).tolist() == expected
    assert in_palette(array(colours), packed) == bytes(v for i in expected for v in palette[i])


@given(st.lists(colour, min_size=1, max_size=256, unique=True), st.data())
def test_a_palette_is_exact_in_both_directions(palette: list[Colour], data: st.DataObject) -> None:
    packed = array(palette).tobytes()
    indices = data.draw(st.lists(st.integers(0, len(palette) - 1)))
    colours = colours_at(indices, packed)
    assert colours == bytes(v for index in indices for v in palette[index])
    assert nearest(np.frombuffer(colours, np.uint8).reshape(-1, 3), packed).tolist() == indices


def test_many_colours_at_once_are_as_exact_as_one() -> None:
    rng = np.random.default_rng(5)
    colours = rng.integers(0, 256, (40_000, 3)).astype(np.uint8)
    palette = rng.integers(0, 256, (256, 3)).astype(np.uint8)
    wide, entries = colours[:, None].astype(np.int64), palette.astype(np.int64)
    expected = np.concatenate(
        [((part - entries) ** 2).sum(axis=2).argmin(axis=1) for part in np.split(wide, 40)]
    )
    assert np.array_equal(nearest(colours, palette.tobytes()), expected)


def test_of_colours_that_are_as_near_the_first_is_taken() -> None:
    assert nearest(array([(1, 0, 0)]), bytes([2, 0, 0, 0, 0, 0])).tolist() == [0]
    assert nearest(array([(9, 9, 9)]), bytes([8, 8, 8, 9, 9, 9, 9, 9, 9])).tolist() == [1]


def test_opposite_colours_do_not_overflow() -> None:
    palette = bytes([255, 255, 255, 0, 0, 0])
    assert nearest(array([(0, 0, 0), (255, 255, 255)]), palette).tolist() == [1, 0]


def test_transparency_lies_on_white_rounded_to_the_nearest() -> None:
    every = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing="ij"), axis=-1)
    pixels = every[:, :, [0, 0, 0, 1]].astype(np.uint8)
    values, alphas = every.reshape(-1, 2).T
    expected = np.rint((values * alphas + 255 * (255 - alphas)) / 255)
    lies = on_white(Image.fromarray(pixels, "RGBA"))
    assert lies.dtype == np.uint8
    assert np.array_equal(lies, np.repeat(expected[:, None], 3, axis=1))


@given(st.lists(st.tuples(channel, channel, channel, channel), min_size=1, max_size=9))
def test_each_channel_lies_on_white_by_itself(pixels: list[Colour]) -> None:
    expected = [
        [int((c * alpha + 255 * (255 - alpha)) / 255 + 0.5) for c in colour]
        for *colour, alpha in pixels
    ]
    assert on_white(rgba([pixels])).tolist() == expected


@pytest.mark.parametrize(
    ("alphas", "rows"),
    [([255, 255, 255], 3), ([255, 0, 0], 1), ([0, 1, 0], 2), ([0, 0, 0], None)],
)
def test_rows_end_with_the_last_that_shows(alphas: list[int], rows: int | None) -> None:
    image = rgba([[(9, 9, 9, 0), (9, 9, 9, alpha)] for alpha in alphas])
    shown = shown_rows(image)
    assert (shown and shown.size) == (rows and (2, rows))
