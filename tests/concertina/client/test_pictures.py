"""Pictures as prompts: whatever they are given as, a server sees the same pixels."""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from concertina.client import InvalidRequest
from concertina.client.requests import prompt_message

MODES = {(): "L", (1,): "L", (2,): "LA", (3,): "RGB", (4,): "RGBA"}


def sent(prompt: Any) -> Image.Image:
    message = prompt_message(prompt, None)
    assert message is not None
    return Image.open(io.BytesIO(message.image.png))


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.sampled_from(sorted(MODES)),
    seed=st.integers(0, 99),
)
def test_an_array_is_the_picture_that_pillow_makes_of_it(
    height: int, width: int, channels: tuple[int, ...], seed: int
) -> None:
    shape = (height, width, *channels)
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    image = sent(array)
    assert (image.mode, image.size) == (MODES[channels], (width, height))
    assert np.array_equal(np.asarray(image).reshape(shape), array)
    assert image.tobytes() == sent(image).tobytes()


def test_rows_need_not_lie_side_by_side() -> None:
    array = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    for view in (array[::-1, ::2], np.asfortranarray(array), array.transpose(1, 0, 2)):
        assert np.array_equal(np.asarray(sent(view)), view)


def test_an_array_of_one_axis_is_token_ids() -> None:
    for kind in (np.uint8, np.int32, np.int64):
        message = prompt_message(np.array([3, 1, 2], kind), None)  # type: ignore[arg-type]
        assert message is not None
        assert list(message.tokens.ids) == [3, 1, 2]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_of_any_kind_are_the_same_picture(kind: Any) -> None:
    rgb = bytes(range(96))
    png = written(Image.new("RGB", (4, 2), (1, 2, 3)), "PNG")
    for data in (rgb, png):
        assert prompt_message(kind(data), None) == prompt_message(data, None)
    assert prompt_message(kind(rgb), None).image.rgb == rgb  # type: ignore[union-attr]
    with pytest.raises(InvalidRequest, match="is a JPEG file"):
        prompt_message(kind(written(Image.new("RGB", (4, 2)), "JPEG")), None)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 2, 3)),
        np.zeros((2, 2, 3), np.uint16),
        np.zeros((2, 2), bool),
        np.zeros((2, 2, 5), np.uint8),
        np.zeros((1, 2, 2, 3), np.uint8),
        np.zeros((0, 2, 3), np.uint8),
        np.zeros((2, 2, 0), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_an_array_that_is_no_picture_is_named(array: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt is a") as raised:
        prompt_message(array, None)
    assert raised.value.field == "prompt"


FORMATS = ("JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def written(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=form, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (8, 7), (300, 200)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_file_of_another_format_is_no_raw_pixels(
    form: str, size: tuple[int, int], mode: str
) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    data = written(Image.fromarray(noise).convert(mode), form)
    name = {"WEBP": "WebP"}.get(form, form)
    message = f"prompt is a {name} file of .* bytes, and .* PIL.Image.open"
    with pytest.raises(InvalidRequest, match=message) as raised:
        prompt_message(data, None)
    assert raised.value.field == "prompt"
    assert sent(Image.open(io.BytesIO(data))).size == size  # what the message says to do


def test_files_as_other_programs_write_them_are_known() -> None:
    image = Image.new("RGB", (9, 5), (1, 2, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (
        written(image, "JPEG", exif=exif, progressive=True),
        written(image, "JPEG", comment=b"hello"),
        written(image, "TIFF", compression="tiff_lzw"),
        written(image, "WEBP", lossless=True),
        b"P6 # by hand\n9 # wide\n 5\n255\n" + image.tobytes(),
    ):
        with pytest.raises(InvalidRequest, match="prompt is a "):
            prompt_message(data, None)


@pytest.mark.parametrize(
    "start",
    [b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\x00\x10", b"BM", b"II*\0", b"RIFF", b"GIF", b"P6", b""],
)
def test_raw_pixels_may_begin_with_any_colour(start: bytes) -> None:
    for rest in (bytes(96), bytes(range(96)), start[:3] * 32):
        rgb = (start + rest)[:96]
        message = prompt_message(rgb, None)
        assert message is not None
        assert message.image.rgb == rgb


def test_telling_is_quick_whatever_the_bytes_are() -> None:
    data = b"P6 " + b"# " * 100_000 + b"\n# x" * 100_000
    began = time.process_time()
    assert prompt_message(data, None) is not None
    assert time.process_time() - began < 1.0


@given(
    st.binary(max_size=300).filter(
        lambda data: not data.startswith((b"GIF8", b"RIFF", b"P", b"\x89PNG"))
    )
)
def test_bytes_of_no_format_are_raw_pixels(data: bytes) -> None:
    message = prompt_message(data, None)
    assert message is not None
    assert message.image.rgb == data
