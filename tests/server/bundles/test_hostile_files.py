"""Bundles and images that were damaged or made up: refused by the error that is meant for it."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format
from PIL import Image

from concertina.bundle.manifest import MANIFEST, fingerprint
from concertina.v1 import bundle_pb2
from concertina.v1 import generation_service_pb2 as pb
from server.api.prompt import prompt_tokens
from server.bundles.bundle import Bundle, load_bundle
from server.errors import BundleError, InvalidRequest
from tests.server.hostile import FORMS, Tally, harmless, mutated

_ODD: tuple[Any, ...] = (
    None, True, -1, 0, 2**70, 1.5, float("nan"),
    "", "\0", "..", "\ud800", "x" * 5_000, [], {}, [[[]]],
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_damaged_bundles_are_refused(form: str, text: Bundle, tmp_path: Path) -> None:
    """Manifests with changed bytes, and with changed values; files with changed bytes."""
    for path in text.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = (tmp_path / MANIFEST).read_bytes()
    rng, tally = random.Random(2), Tally("manifests", form)
    for _ in range(tally.promised // 3):
        changed = json.loads(manifest)
        _change(changed, rng)
        for content in (mutated(manifest, rng), json.dumps(changed).encode(), _signed(changed)):
            _refused(tmp_path, MANIFEST, content, tally)
    _refused(tmp_path, MANIFEST, b"[" * 100_000, tally)
    _refused(tmp_path, MANIFEST, b'{"name":' * 5_000, tally)
    (tmp_path / MANIFEST).write_bytes(manifest)
    step = (text.folder / "step.onnx").read_bytes()
    for _ in range(20):
        _refused(tmp_path, "step.onnx", mutated(step, rng), tally)
    tally.close()


def _change(value: Any, rng: random.Random) -> None:
    """Changes one value in a JSON document."""
    keys = [*value] if isinstance(value, dict) else [*range(len(value))]
    key = rng.choice(keys)
    inner = value[key]
    if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
        _change(inner, rng)
    else:
        value[key] = rng.choice(_ODD)


def _signed(changed: Any) -> bytes:
    """The manifest with a fingerprint that matches its content."""
    try:
        manifest = json_format.ParseDict(changed, bundle_pb2.Manifest())
    except (json_format.ParseError, SystemError):
        return b""
    manifest.fingerprint = fingerprint(manifest)
    return json_format.MessageToJson(manifest, preserving_proto_field_name=True).encode()


def _refused(folder: Path, name: str, content: bytes, tally: Tally) -> None:
    """Checks that the bundle is refused, or that its state sizes are consistent."""
    (folder / name).write_bytes(content)
    tally.cases += 1
    try:
        bundle = load_bundle(folder)
    except BundleError as error:
        assert str(folder) in str(error)
        return
    for pushed in (0, 1, bundle.context):
        sizes = bundle.state_bytes(pushed)
        assert 0 <= sum(sizes.values()) <= bundle.max_state_bytes
    assert bundle.typecode and bundle.context and (bundle.span is None or bundle.span > 1)


def _png(width: int, height: int, rng: random.Random) -> bytes:
    content = io.BytesIO()
    mode, channels = rng.choice([("L", 1), ("RGB", 3), ("RGBA", 4)])
    pixels = np.frombuffer(rng.randbytes(width * height * channels), np.uint8)
    Image.frombytes(mode, (width, height), pixels.tobytes()).save(content, "PNG")
    return content.getvalue()


def _chunk(name: bytes, content: bytes) -> bytes:
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def _bomb(width: int, height: int, packed: bytes, *more: bytes) -> bytes:
    """A PNG whose header claims this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [_chunk(b"IHDR", header), *more, _chunk(b"IDAT", packed), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _bombs() -> list[bytes]:
    zeros = zlib.compress(bytes(64 << 20), 9)
    text = b"a\0\0" + zeros
    return [
        *(_bomb(2**31 - 1, height, zeros) for height in (1, 8, 2**31 - 1)),
        _bomb(20_000, 20_000, zeros),
        _bomb(8, 8, zeros),
        _bomb(8, 2**31 - 1, zeros),
        _bomb(0, 0, b""),
        _bomb(8, 8, zlib.compress(bytes(200)), _chunk(b"zTXt", text)),
        _bomb(8, 8, zlib.compress(bytes(200)), _chunk(b"iCCP", text)),
        _bomb(
            8, 8, zlib.compress(bytes(200)), *[_chunk(b"acTL", struct.pack(">II", 2**31, 0))] * 9
        ),
    ]


@pytest.mark.parametrize("form", FORMS)
def test_damaged_images_are_refused(form: str, image: Bundle) -> None:
    rng, tally = random.Random(3), Tally("images", form)
    contents = _bombs()
    while len(contents) < tally.promised:
        whole = _png(8, rng.choice([1, 3, 8, 9]), rng)
        changed = mutated(whole, rng)
        # With correct checksums, the change reaches the decoder.
        contents.append(_mended(changed) if rng.random() < 0.5 else changed)
    taken = 0
    for content in contents:
        tally.cases += 1
        try:
            prompt_tokens(image, pb.Prompt(image=pb.ImageRows(png=content)), room=0)
            taken += 1
        except InvalidRequest as error:
            assert harmless(error.message)
    assert 0 < taken < tally.cases // 2
    tally.close()


def _mended(png: bytes) -> bytes:
    """The chunks that can be read, with correct lengths and checksums."""
    out, at = png[:8], 8
    while at + 12 <= len(png):
        size = min(int.from_bytes(png[at : at + 4], "big"), len(png) - at - 12)
        out += _chunk(png[at + 4 : at + 8], png[at + 8 : at + 8 + size])
        at += 12 + size
    return out
