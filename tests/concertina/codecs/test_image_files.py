"""Image files as a viewer shows them: every mode, depth and orientation, and what is no image."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from concertina.codecs.image_files import (
    FORMATS,
    MOST_PIXELS,
    ImageError,
    ImageTooLarge,
    open_image,
)

GREY, COLOUR, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 4, 6
_CHANNELS = {GREY: 1, COLOUR: 3, GREY_ALPHA: 2, COLOUR_ALPHA: 4}


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    width: int, height: int, depth: int, kind: int, rows: bytes, clear: tuple[int, ...] = ()
) -> bytes:
    """A PNG by its definition. rows: the packed samples. clear: the transparent value."""
    stride = max(1, len(rows) // height)
    lines = b"".join(b"\0" + rows[at : at + stride] for at in range(0, len(rows), stride))
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", header)]
    if clear:
        parts.append(chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)))
    parts += [chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def shown(data: bytes, **options: int) -> list[tuple[int, ...]]:
    """The pixels of an opened image, in raster order."""
    image = open_image(data, **options)
    assert image.mode == "RGBA"
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 4).tolist()]


def grey(*values: int) -> list[tuple[int, ...]]:
    return [(value, value, value, 255) for value in values]


# ---- depths


@given(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=20))
def test_grey_of_16_bits_keeps_its_upper_8(values: list[int]) -> None:
    packed = struct.pack(f">{len(values)}H", *values)
    expected = grey(*(value >> 8 for value in values))
    assert shown(png(len(values), 1, 16, GREY, packed)) == expected
    # As in colour, so that a grey picture is the same in both forms.
    colour = struct.pack(f">{3 * len(values)}H", *(v for value in values for v in 3 * [value]))
    assert shown(png(len(values), 1, 16, COLOUR, colour)) == expected


def test_what_8_bits_can_say_is_the_same_in_16() -> None:
    eight = np.arange(256, dtype=np.uint16).reshape(1, 256)
    assert shown(saved(Image.fromarray(eight * 257))) == grey(*range(256))
    assert shown(saved(Image.fromarray(eight * 257), "TIFF")) == grey(*range(256))
    assert shown(saved(Image.fromarray((eight * 257).astype(np.int32)), "TIFF")) == grey(
        *range(256)
    )
    pgm = b"P5 256 1 65535\n" + (eight * 257).astype(">u2").tobytes()
    assert shown(pgm) == grey(*range(256))


@given(st.sampled_from([1, 2, 4, 8, 16]), st.data())
def test_a_transparent_grey_is_transparent_at_every_depth(depth: int, data: st.DataObject) -> None:
    top = (1 << depth) - 1
    values = data.draw(st.lists(st.integers(0, top), min_size=16, max_size=16))
    clear = data.draw(st.sampled_from(values))
    bits = "".join(f"{value:0{depth}b}" for value in values)
    packed = int(bits, 2).to_bytes(len(bits) // 8, "big")
    expected = [
        (v >> 8 if depth == 16 else v * 255 // top, 0 if v == clear else 255) for v in values
    ]
    pixels = shown(png(16, 1, depth, GREY, packed, (clear,)))
    assert [(pixel[0], pixel[3]) for pixel in pixels] == expected


def test_a_transparent_colour_is_transparent_in_16_bits() -> None:
    packed = struct.pack(">6H", 1000, 2000, 3000, 40000, 40000, 40000)
    pixels = shown(png(2, 1, 16, COLOUR, packed, (1000, 2000, 3000)))
    assert [pixel[3] for pixel in pixels] == [0, 255]


@given(st.sampled_from([8, 16]), st.sampled_from([GREY_ALPHA, COLOUR_ALPHA]), st.data())
def test_alpha_is_kept(depth: int, kind: int, data: st.DataObject) -> None:
    values = st.integers(0, (1 << depth) - 1)
    samples = data.draw(st.lists(values, min_size=_CHANNELS[kind], max_size=_CHANNELS[kind]))
    packed = struct.pack(f">{len(samples)}{'H' if depth == 16 else 'B'}", *samples)
    *colour, alpha = (sample >> (depth - 8) for sample in samples)
    if kind == GREY_ALPHA:
        colour *= 3
    assert shown(png(1, 1, depth, kind, packed)) == [(*colour, alpha)]


def test_floats_lie_between_black_and_white() -> None:
    values = np.array([[0, 0.25, 128 / 255, 1]], np.float32)
    assert shown(saved(Image.fromarray(values), "TIFF")) == grey(0, 64, 128, 255)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (np.array([[0, 70_000]], np.int32), "from 0 to 70000, but black is 0 and white is 65535"),
        (np.array([[-1, 9]], np.int32), "from -1 to 9"),
        (np.array([[0, 255]], np.float32), "from 0 to 255, but black is 0 and white is 1"),
        (np.array([[0, np.nan]], np.float32), "save it with 8 or 16 bits"),
    ],
)
def test_grey_whose_white_is_not_known_is_refused(values: np.ndarray, named: str) -> None:
    with pytest.raises(ImageError, match=named):
        open_image(saved(Image.fromarray(values), "TIFF"))


# ---- modes and formats


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_shows_red_or_its_grey(mode: str) -> None:
    image = Image.new("RGB", (2, 2), (255, 0, 0)).convert(mode)
    form = "TIFF" if mode in {"CMYK", "YCbCr"} else "PNG"
    reds = {"1": {0, 255}, "L": {76}, "LA": {76}}.get(mode, {254, 255})
    for pixel in shown(saved(image, form)):
        assert pixel[0] in reds
        assert pixel[3] == 255


def test_a_colour_space_without_colours_of_a_screen_is_refused() -> None:
    lab = saved(Image.new("LAB", (2, 2)), "TIFF")
    with pytest.raises(ImageError, match="colour space LAB: save it as RGB"):
        open_image(lab)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read(form: str) -> None:
    image = Image.new("RGB", (4, 3), (10, 200, 30))
    options = {"lossless": True} if form == "WEBP" else {}
    opened = open_image(saved(image, form, **options))
    assert opened.size == (4, 3)
    assert np.abs(np.asarray(opened)[:, :, :3].astype(int) - [10, 200, 30]).max() < 4


def test_only_the_formats_that_are_asked_for_are_read() -> None:
    image = Image.new("RGB", (2, 1), "red")
    for form in FORMATS[1:]:
        with pytest.raises(ImageError, match="is not a readable PNG"):
            open_image(saved(image, form), ("PNG",))
    with pytest.raises(ImageError, match=r"is not a readable image \(PNG, JPEG"):
        open_image(saved(image, "EPS"))


def test_an_animation_shows_its_first_image() -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert shown(data) == 4 * [(255, 0, 0, 255)]


# ---- orientation

_PICTURE = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
# What a viewer has to do to a picture with each orientation.
_TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", _TURNS)
def test_a_picture_is_upright(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    data = saved(Image.fromarray(_PICTURE), form, exif=exif, **options)
    opened = open_image(data)
    assert np.array_equal(np.asarray(opened)[:, :, :3], _TURNS[orientation](_PICTURE))
    assert not opened.getexif()  # else whoever gets it next turns it again


def test_a_photograph_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("RGB", (32, 16), "white")
    wide.paste("black", (0, 0, 16, 16))
    opened = open_image(saved(wide, "JPEG", exif=exif))
    assert opened.size == (16, 32)
    top, bottom = (opened.getpixel((8, y)) for y in (4, 28))
    assert top < (20, 20, 20, 255) < bottom


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0is no TIFF",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01\0\x03\0\0\0\0\0\0",  # a text
    ],
)
def test_broken_exif_is_as_good_as_none(exif: bytes) -> None:
    data = saved(Image.fromarray(_PICTURE))
    data = data[:33] + chunk(b"eXIf", exif) + data[33:]
    assert np.array_equal(np.asarray(open_image(data))[:, :, :3], _PICTURE)


# ---- limits, and files that are none


def test_an_image_that_claims_too_much_is_not_decoded() -> None:
    small = saved(Image.new("RGB", (40, 30), "red"))
    header = small[:60]
    with pytest.raises(ImageTooLarge, match=r"is 40x30 pixels, 1,200 in all; the limit is 1,199"):
        open_image(header, most_pixels=1199)
    with pytest.raises(ImageError, match="not a readable"):  # the limit is not met: it is decoded
        open_image(header, most_pixels=1200)
    assert open_image(small, most_pixels=1200).size == (40, 30)


@pytest.mark.parametrize("size", [(8193, 8192), (20_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused(size: tuple[int, int]) -> None:
    assert MOST_PIXELS == 8192 * 8192
    with pytest.raises(ImageError, match=r"the limit (is|of) 67,108,864"):
        open_image(png(*size, 8, GREY, b"\0"))


def _comment_bomb() -> bytes:
    data = saved(Image.new("RGB", (2, 2)))
    return data[:33] + chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(50_000_000))) + data[33:]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"P1 is the first",
        b"P6 is the first",
        b"BM25 is a ranking function, and this is a text about it, of some length.\n",
        b"GIF89a is a format",
        b"II*\0 begins a TIFF",
        b"RIFF1234WEBPVP8 ",
        b"\xff\xd8\xff\xe0 begins a JPEG",
        b"\x89PNG\r\n\x1a\n",
        b"%!PS-Adobe-3.0 EPSF-3.0",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        _comment_bomb(),
    ],
    ids=range(12),
)
def test_what_is_no_image_is_refused_in_a_line(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"^is not a readable") as caught:
        open_image(data)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("form", FORMATS)
@settings(deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(form: str, data: st.DataObject) -> None:
    whole = saved(Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)), form)
    at = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(1, 255))
    damaged = whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :]
    for file in (damaged, whole[:at]):
        try:
            assert open_image(file, most_pixels=10_000).mode == "RGBA"
        except ImageError as error:
            assert str(error).startswith(("is ", "has "))
