"""A bundle that was altered in any way is refused, and the file that is wrong is named."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from google.protobuf import json_format

from concertina.bundle.manifest import MANIFEST, ManifestError, fingerprint, read_manifest

FILES = ("step.onnx", "fold.onnx")


def flip(path: Path, offset: int, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    path.write_bytes(content)


def test_what_was_exported_is_read(fixed_bundle: Path, copied: Path) -> None:
    assert read_manifest(copied) == read_manifest(fixed_bundle)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("where", [0.0, 0.33, 0.999999])
def test_one_flipped_bit_is_seen(file: str, where: float, copied: Path) -> None:
    path = copied / file
    flip(path, int(where * path.stat().st_size))
    with pytest.raises(ManifestError, match=f"{path} does not match its checksum"):
        read_manifest(copied)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kept", [-1, 100, 0])
def test_a_file_cut_short_is_seen(file: str, kept: int, copied: Path) -> None:
    path = copied / file
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ManifestError, match=f"{path} has .* bytes, the manifest says"):
        read_manifest(copied)


def test_a_file_that_grew_is_seen(copied: Path) -> None:
    with (copied / "step.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ManifestError, match=r"step\.onnx has .* bytes, the manifest says"):
        read_manifest(copied)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(file: str, copied: Path) -> None:
    (copied / file).unlink()
    with pytest.raises(ManifestError, match=f"{copied / file} cannot be read: No such file"):
        read_manifest(copied)


def test_a_bundle_without_a_manifest_is_named(copied: Path) -> None:
    (copied / MANIFEST).unlink()
    with pytest.raises(ManifestError, match=f"{copied} is not a bundle: it holds no {MANIFEST}"):
        read_manifest(copied)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"context": 32', '"context": 33'),
        ('"span": 8', '"span": 4'),
        ('"name": "tiny-fixed"', '"name": "tiny-fixes"'),
        ('"attention": "fixed"', '"attention": "full"'),
        ('"initial": -3.4028234663852886e+38', '"initial": 0.0'),
        ('"fingerprint": "', '"fingerprint": "0'),
        ('"version": "7",', ""),
    ],
)
def test_an_edited_manifest_is_seen(old: str, new: str, copied: Path) -> None:
    path = copied / MANIFEST
    before = path.read_text()
    assert old in before
    path.write_text(before.replace(old, new, 1))
    with pytest.raises(ManifestError, match=f"{path} was altered"):
        read_manifest(copied)


def test_a_file_taken_off_the_list_is_seen(copied: Path) -> None:
    path = copied / MANIFEST
    first, middle, last = path.read_text().partition('"path": "fold.onnx"')
    path.write_text(first + '"path": "step.onnx"' + last)
    assert middle
    with pytest.raises(ManifestError, match="was altered"):
        read_manifest(copied)


def test_no_flipped_bit_of_the_manifest_changes_what_is_read(
    fixed_bundle: Path, copied: Path
) -> None:
    path, expected = copied / MANIFEST, read_manifest(fixed_bundle)
    intact = path.read_bytes()
    refused = 0
    for offset in range(0, len(intact), 5):
        flip(path, offset, mask=1 << offset % 8)
        try:
            assert read_manifest(copied) == expected
        except ManifestError as error:
            refused += 1
            assert str(path) in str(error)
        path.write_bytes(intact)
    assert refused > 0.7 * len(range(0, len(intact), 5))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{}", b'{"format": 1, "x": 2}'])
def test_what_is_no_manifest_is_refused(content: bytes, copied: Path) -> None:
    (copied / MANIFEST).write_bytes(content)
    with pytest.raises(ManifestError, match=f"{copied / MANIFEST} (cannot be read|has format 0)"):
        read_manifest(copied)


def test_a_file_in_place_of_the_bundle_is_named(copied: Path) -> None:
    with pytest.raises(ManifestError, match=r"step\.onnx/manifest\.json cannot be read: Not a dir"):
        read_manifest(copied / "step.onnx")


def test_another_format_is_refused(copied: Path) -> None:
    path = copied / MANIFEST
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ManifestError, match="has format 2, this server reads format 1"):
        read_manifest(copied)


@pytest.mark.parametrize("name", ["../secret", "sub/secret", "/etc/hostname", ".", "..", ""])
def test_a_path_out_of_the_bundle_is_refused(name: str, copied: Path) -> None:
    """Even when checksum and fingerprint are right."""
    (copied / "sub").mkdir()
    for secret in (copied.parent / "secret", copied / "sub" / "secret"):
        secret.write_text("not of the bundle")
    manifest = read_manifest(copied)
    content = b"not of the bundle"
    digest = hashlib.sha256(content).hexdigest()
    manifest.files.add(path=name, sha256=digest, bytes=len(content))
    manifest.fingerprint = fingerprint(manifest)
    text = json_format.MessageToJson(manifest, preserving_proto_field_name=True)
    (copied / MANIFEST).write_text(text)
    with pytest.raises(ManifestError, match=r"is not a plain file|cannot be read: Is a directory"):
        read_manifest(copied)
