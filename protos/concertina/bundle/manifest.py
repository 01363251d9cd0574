"""The manifest of a bundle on disk: the export writes it, the server reads and verifies it."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable
from pathlib import Path

from google.protobuf import json_format

from concertina.bundle.external_data import GraphError, external_files
from concertina.v1 import bundle_pb2 as pb

MANIFEST = "manifest.json"
FORMAT = 1
_GRAPH = ".onnx"


class ManifestError(Exception):
    """A bundle that cannot be used. The message names the file and the reason."""


def write_manifest(folder: Path, manifest: pb.Manifest, files: Iterable[str]) -> None:
    """Write `manifest.json` into `folder`, with checksums of `files` and the fingerprint.

    The files that graphs keep weights in are added to `files`.
    """
    manifest.format = FORMAT
    del manifest.files[:]
    listed = [*files]
    graphs = [folder / path for path in listed if path.endswith(_GRAPH)]
    beside = {name for path in graphs for name in external_files(path)}
    for path in (*listed, *sorted(beside - {*listed})):
        digest, size = _checksum(folder / path)
        manifest.files.add(path=path, sha256=digest, bytes=size)
    manifest.fingerprint = fingerprint(manifest)
    text = json_format.MessageToJson(manifest, preserving_proto_field_name=True)
    (folder / MANIFEST).write_text(text + "\n")


def read_manifest(folder: Path) -> pb.Manifest:
    """Read and verify the bundle in `folder`: format, fingerprint, and every file's checksum.

    Files are read a piece at a time. Raises ManifestError if anything is missing, damaged or
    altered, or if a graph keeps weights in a file that the manifest does not list.
    """
    path = folder / MANIFEST
    try:
        manifest = json_format.Parse(path.read_text(encoding="utf-8"), pb.Manifest())
    except FileNotFoundError:
        raise ManifestError(f"{folder} is not a bundle: it holds no {MANIFEST}") from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}") from None
    except (json_format.ParseError, UnicodeDecodeError, SystemError) as error:
        # protobuf raises SystemError for half a surrogate pair in place of a name.
        raise ManifestError(f"{path} cannot be read: {error}") from None
    if manifest.format != FORMAT:
        raise ManifestError(
            f"{path} has format {manifest.format}, this server reads format {FORMAT}: export again"
        )
    if manifest.fingerprint != fingerprint(manifest):
        raise ManifestError(f"{path} was altered: its fingerprint does not match its content")
    for file in manifest.files:
        _verify(folder, file)
    listed = {file.path for file in manifest.files}
    for name in sorted(listed):
        if name.endswith(_GRAPH):
            _check_graph(folder / name, listed)
    return manifest


def fingerprint(manifest: pb.Manifest) -> str:
    """SHA-256, in hex, of `manifest` without its fingerprint, in canonical JSON."""
    fields = json_format.MessageToDict(manifest, preserving_proto_field_name=True)
    fields.pop("fingerprint", None)
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _verify(folder: Path, file: pb.BundleFile) -> None:
    path = folder / file.path
    if Path(file.path).name != file.path or "\0" in file.path:
        raise ManifestError(f"{folder / MANIFEST} names {file.path!r}, which is not a plain file")
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # reading a pipe or a device might never end
            raise ManifestError(f"{path} is not a plain file: copy or export the bundle again")
        if found.st_size != file.bytes:
            raise ManifestError(
                f"{path} has {found.st_size} bytes, the manifest says {file.bytes}: "
                "the file was altered or cut short; copy or export the bundle again"
            )
        digest, _ = _checksum(path)
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}") from None
    if digest != file.sha256:
        raise ManifestError(
            f"{path} does not match its checksum: the file was altered or damaged; "
            "copy or export the bundle again"
        )


def _checksum(path: Path) -> tuple[str, int]:
    """SHA-256, in hex, and size of a file, which may be larger than the memory."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return digest.hexdigest(), file.tell()


def _check_graph(path: Path, listed: set[str]) -> None:
    """Refuse a graph that would read anything but the files that were verified."""
    try:
        others = external_files(path) - listed
    except GraphError as error:
        raise ManifestError(f"{path} is no ONNX graph ({error}): export the bundle again") from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}") from None
    if others:
        raise ManifestError(
            f"{path} keeps weights in {min(others)!r}, which is no file that {MANIFEST} lists: "
            "export the bundle again"
        )
