from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from concertina.v1 import generation_service_pb2 as pb
from server.api.limits import require_within_limits
from server.api.prompt import prompt_tokens
from server.bundles.bundle import Bundle
from server.errors import InvalidRequest
from tests.fakes import bare_bundle

SIZE, COLOURS = 8, 16


@pytest.fixture(scope="module")
def palette(image: Bundle) -> np.ndarray:
    return np.frombuffer(image.manifest.image.palette, np.uint8).reshape(-1, 3)


def _png(pixels: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG", **options)
    return file.getvalue()


def _image(png: bytes) -> pb.Prompt:
    return pb.Prompt(image=pb.ImageRows(png=png))


def _tokens(bundle: Bundle, prompt: pb.Prompt, room: int = 1) -> list[int]:
    read = prompt_tokens(bundle, prompt, room=room)
    return [read.start, *read.tokens.tolist()]


def _refusal(bundle: Bundle, prompt: pb.Prompt, room: int = 1) -> str:
    with pytest.raises(InvalidRequest) as caught:
        require_within_limits(prompt)
        prompt_tokens(bundle, prompt, room=room)
    assert len(caught.value.message) < 400
    return caught.value.message


# ---- text and ids


def test_text_becomes_its_bytes_after_the_start_token(text: Bundle) -> None:
    assert _tokens(text, pb.Prompt(text="aé\0")) == [256, 97, 0xC3, 0xA9, 0]


def test_ids_are_taken_as_they_are(text: Bundle, image: Bundle) -> None:
    assert _tokens(text, pb.Prompt(tokens=pb.TokenIds(ids=[0, 255]))) == [256, 0, 255]
    assert _tokens(image, pb.Prompt(tokens=pb.TokenIds(ids=[0, 15]))) == [16, 0, 15]


def test_a_label_takes_the_place_of_the_start_token(image: Bundle) -> None:
    assert [_tokens(image, pb.Prompt(label=label)) for label in ("circle", "square", "star")] == [
        [17],
        [18],
        [19],
    ]
    assert _tokens(image, pb.Prompt(tokens=pb.TokenIds(ids=[3]), label="star")) == [19, 3]


def test_a_prompt_may_leave_just_the_room_asked_for(text: Bundle) -> None:
    assert len(_tokens(text, pb.Prompt(text="x" * 96), room=0)) == 97
    assert len(_tokens(text, pb.Prompt(text="x" * 95), room=1)) == 96


@pytest.mark.parametrize(
    ("kind", "prompt", "named"),
    [
        ("text", pb.Prompt(), ["prompt is empty"]),
        ("text", pb.Prompt(text=""), ["prompt.text is empty", "at least 1"]),
        ("text", pb.Prompt(tokens=pb.TokenIds()), ["prompt.tokens.ids is empty", "at least 1"]),
        ("text", pb.Prompt(text="x" * 96), ["96 tokens", "limit is 95", "context of 96"]),
        ("text", pb.Prompt(text="€" * 40), ["120 tokens", "limit is 95"]),
        ("text", pb.Prompt(text="x" * 1_000_000), ["1000000 tokens", "limit is 95"]),
        ("text", pb.Prompt(tokens=pb.TokenIds(ids=[5] * 97)), ["97 tokens", "limit is 95"]),
        ("text", pb.Prompt(tokens=pb.TokenIds(ids=[1, 256])), ["ids[1] is 256", "below 256"]),
        (
            "text",
            pb.Prompt(tokens=pb.TokenIds(ids=[(1 << 32) - 1])),
            ["ids[0] is 4294967295", "below 256"],
        ),
        ("image", pb.Prompt(tokens=pb.TokenIds(ids=[16])), ["ids[0] is 16", "below 16"]),
        ("image", pb.Prompt(tokens=pb.TokenIds(ids=[1] * 64)), ["64 tokens", "limit is 63"]),
        ("image", pb.Prompt(text="a cat"), ["prompt.text", "tiny-image makes images"]),
        ("text", _image(b"x"), ["prompt.image", "tiny-text makes text"]),
        ("image", pb.Prompt(image=pb.ImageRows()), ["prompt.image is empty", "png or rgb"]),
        ("image", pb.Prompt(label="blob"), ["prompt.label is 'blob'", "'circle', 'square'"]),
        ("image", pb.Prompt(label=""), ["prompt.label is ''", "'star'"]),
        ("image", pb.Prompt(label="x" * 256), ["prompt.label is 'xxx"]),
        ("text", pb.Prompt(label="circle", text="x"), ["prompt.label is 'circle'", "none"]),
        ("image", pb.Prompt(image=pb.ImageRows(rgb=b"")), ["rgb has 0 bytes", "1 to 8 rows"]),
        ("image", pb.Prompt(image=pb.ImageRows(rgb=b"x" * 25)), ["25 bytes", "of 24 bytes"]),
        ("image", pb.Prompt(image=pb.ImageRows(rgb=b"x" * 216)), ["216 bytes", "1 to 8 rows"]),
        ("image", pb.Prompt(image=pb.ImageRows(rgb=b"x" * 192)), ["64 tokens", "limit is 63"]),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, pb.Prompt) else None,
)  # fmt: skip
def test_an_invalid_prompt_is_refused(
    request: pytest.FixtureRequest, kind: str, prompt: pb.Prompt, named: list[str]
) -> None:
    message = _refusal(request.getfixturevalue(kind), prompt)
    assert [part for part in named if part not in message] == [], message


# ---- images


def test_every_colour_of_the_palette_is_its_own(image: Bundle, palette: np.ndarray) -> None:
    indices = np.random.default_rng(0).permutation(np.arange(7 * SIZE) % COLOURS)
    pixels = palette[indices].reshape(7, SIZE, 3)
    expected = [COLOURS, *indices.tolist()]
    assert _tokens(image, _image(_png(pixels))) == expected
    rows = pb.ImageRows(rgb=pixels.tobytes())
    assert _tokens(image, pb.Prompt(image=rows)) == expected


@given(st.binary(min_size=24, max_size=24))
def test_other_colours_go_to_the_nearest(rgb: bytes) -> None:
    image = _palette_only()
    colours = image.manifest.image.palette

    def distance(pixel: bytes, k: int) -> int:
        return sum((a - b) ** 2 for a, b in zip(pixel, colours[3 * k : 3 * k + 3], strict=True))

    expected = [
        min(range(COLOURS), key=lambda k: distance(rgb[at : at + 3], k))
        for at in range(0, len(rgb), 3)
    ]
    assert _tokens(image, pb.Prompt(image=pb.ImageRows(rgb=rgb)))[1:] == expected


@pytest.mark.parametrize("mode", ["P", "L", "LA", "1", "RGBA", "I;16"])
def test_every_form_of_png_is_read(image: Bundle, mode: str) -> None:
    grey = np.where(np.arange(2 * SIZE).reshape(2, SIZE) % 3, 255, 0)
    picture = Image.fromarray(grey.astype(np.uint8))
    if mode == "I;16":
        picture = Image.fromarray((grey * 257).astype(np.uint16))
    file = io.BytesIO()
    (picture if mode == "I;16" else picture.convert(mode)).save(file, "PNG")
    rgb = np.repeat(grey[:, :, None], 3, axis=2).astype(np.uint8).tobytes()
    expected = _tokens(image, pb.Prompt(image=pb.ImageRows(rgb=rgb)))
    assert _tokens(image, _image(file.getvalue())) == expected


@given(st.lists(st.integers(0, 0xFFFF), min_size=SIZE, max_size=SIZE))
def test_grey_of_16_bits_is_as_bright_as_in_8(values: list[int]) -> None:
    file = io.BytesIO()
    Image.fromarray(np.array([values], np.uint16)).save(file, "PNG")
    rgb = bytes(value >> 8 for value in values for _ in range(3))
    image = _palette_only()
    expected = _tokens(image, pb.Prompt(image=pb.ImageRows(rgb=rgb)))
    assert _tokens(image, _image(file.getvalue())) == expected


def test_a_png_is_turned_upright(image: Bundle, palette: np.ndarray) -> None:
    indices = np.arange(2 * SIZE).reshape(2, SIZE)
    rows = palette[indices]
    exif = Image.Exif()
    for orientation, stored in (
        (3, rows[::-1, ::-1]),
        (6, np.rot90(rows)),
        (8, np.rot90(rows, -1)),
    ):
        exif[0x0112] = orientation
        png = _png(np.ascontiguousarray(stored), exif=exif)
        assert _tokens(image, _image(png))[1:] == indices.ravel().tolist()


def test_transparent_rows_at_the_bottom_are_to_be_generated(
    image: Bundle, palette: np.ndarray
) -> None:
    pixels = np.zeros((SIZE, SIZE, 4), np.uint8)
    pixels[:3] = [*palette[5], 255]
    pixels[1] = 0  # a transparent row above others stays, and is white
    tokens = _tokens(image, _image(_png(pixels)))
    white = int(((palette.astype(int) - 255) ** 2).sum(axis=1).argmin())
    assert tokens == [COLOURS, *[5] * SIZE, *[white] * SIZE, *[5] * SIZE]


def test_a_row_that_barely_shows_is_a_row(image: Bundle) -> None:
    pixels = np.zeros((SIZE, SIZE, 4), np.uint8)
    pixels[4, 7] = [0, 0, 0, 1]
    assert len(_tokens(image, _image(_png(pixels)))) == 1 + 5 * SIZE


def test_half_transparency_lies_on_white(image: Bundle) -> None:
    pixels = np.full((1, SIZE, 4), [0, 0, 0, 128], np.uint8)
    grey = bytes([127] * 3 * SIZE)
    assert _tokens(image, _image(_png(pixels))) == _tokens(
        image, pb.Prompt(image=pb.ImageRows(rgb=grey))
    )


def _header(width: int, height: int) -> bytes:
    """A PNG whose header claims more pixels than it has."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 1000)
    chunks = [(13, ihdr), (len(data) - 4, data), (0, b"IEND")]
    body = b"".join(struct.pack(">I", n) + c + struct.pack(">I", zlib.crc32(c)) for n, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def _solid(width: int, height: int, alpha: int = 255) -> bytes:
    return _png(np.full((height, width, 4), alpha))


_NOISE = _png(np.random.default_rng(0).integers(256, size=(4, SIZE, 4)))


def _as(form: str) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(_solid(SIZE, 2))).convert("RGB").save(file, form)
    return file.getvalue()


def _text_bomb() -> bytes:
    """A compressed comment that unpacks to far more than its file."""
    comment = b"zTXtx\0\0" + zlib.compress(b"\0" * 50_000_000)
    chunk = struct.pack(">I", len(comment) - 4) + comment + struct.pack(">I", zlib.crc32(comment))
    solid = _solid(SIZE, 2)
    return solid[:33] + chunk + solid[33:]


@pytest.mark.parametrize(
    ("png", "named"),
    [
        (b"", ["not a readable PNG", "0 bytes"]),
        (b"GIF89a" + b"\0" * 100, ["not a readable PNG", "106 bytes"]),
        (b"\x89PNG\r\n\x1a\n", ["not a readable PNG", "8 bytes"]),
        (_NOISE[:120], ["not a readable PNG", "120 bytes"]),
        (_NOISE[:40], ["not a readable PNG", "40 bytes"]),
        (_NOISE.replace(b"IDAT", b"JUNK"), ["not a readable PNG"]),
        (_text_bomb(), ["not a readable PNG"]),
        (_as("GIF"), ["not a readable PNG"]),
        (_as("BMP"), ["not a readable PNG"]),
        (_header(0, 0), ["prompt.image.png"]),
        (_header(100_000, 100_000), ["prompt.image.png"]),
        (_header(2**31 - 1, 2**31 - 1), ["prompt.image.png"]),
        (_header(SIZE, 2**31 - 1), ["prompt.image.png"]),
        (_header(12_000, 8_000), ["prompt.image.png"]),
        (_header(2_000, 2_000), ["2000x2000", "8 wide", "at most 8 high"]),
        (_solid(SIZE - 1, 2), ["7x2 pixels", "8 wide"]),
        (_solid(SIZE + 1, 2), ["9x2 pixels", "8 wide"]),
        (_solid(SIZE, SIZE + 1), ["8x9 pixels", "at most 8 high"]),
        (_solid(SIZE, SIZE), ["64 tokens", "limit is 63"]),
        (_solid(SIZE, 3, alpha=0), ["wholly transparent", "at least 1 row"]),
        (
            b"\x89PNG\r\n\x1a\n" + b"\0" * 10_000_000,
            ["10000008 bytes", "is 1048576"],
        ),
    ],
    ids=range(21),
)
def test_an_invalid_png_is_refused(image: Bundle, png: bytes, named: list[str]) -> None:
    message = _refusal(image, _image(png))
    assert [part for part in named if part not in message] == [], message


def _palette_only() -> Bundle:
    """An image bundle for tests of hypothesis, which does not mix with fixtures."""
    bundle = bare_bundle(SIZE, SIZE * SIZE)
    bundle.manifest.modality = 2  # type: ignore[assignment]
    bundle.manifest.vocabulary = COLOURS
    bundle.manifest.image.width = bundle.manifest.image.height = SIZE
    bundle.manifest.image.palette = bytes(range(0, 240, 5))
    return bundle


def test_a_decompression_bomb_is_not_logged(image: Bundle) -> None:
    with warnings.catch_warnings(record=True) as noise:
        warnings.simplefilter("always")
        _refusal(image, _image(_header(12_000, 8_000)))
    assert noise == []


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(junk: bytes) -> None:
    for png in (junk, _NOISE[:8] + junk, _NOISE[:33] + junk, _NOISE[:100] + junk):
        assert "prompt.image.png" in _refusal(_palette_only(), _image(png))


@given(st.integers(0, len(_NOISE) - 1), st.integers(1, 255))
def test_a_damaged_png_is_read_or_refused(at: int, flip: int) -> None:
    png = _NOISE[:at] + bytes([_NOISE[at] ^ flip]) + _NOISE[at + 1 :]
    try:
        tokens = _tokens(_palette_only(), _image(png))
    except InvalidRequest as error:
        assert "prompt.image.png" in error.message
    else:
        assert len(tokens) % SIZE == 1
