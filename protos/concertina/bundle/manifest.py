"""The manifest of a bundle on disk: the export writes it, the server reads and verifies it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from google.protobuf import json_format

from concertina.v1 import bundle_pb2 as pb

MANIFEST = "manifest.json"
FORMAT = 1


class ManifestError(Exception):
    """A bundle that cannot be used. The message names the file and the reason."""


def write_manifest(folder: Path, manifest: pb.Manifest, files: Iterable[str]) -> None:
    """Write `manifest.json` into `folder`, with checksums of `files` and the fingerprint."""
    manifest.format = FORMAT
    del manifest.files[:]
    for path in files:
        content = (folder / path).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        manifest.files.add(path=path, sha256=digest, bytes=len(content))
    manifest.fingerprint = fingerprint(manifest)
    text = json_format.MessageToJson(manifest, preserving_proto_field_name=True)
    (folder / MANIFEST).write_text(text + "\n")


def read_manifest(folder: Path) -> pb.Manifest:
    """Read and verify the bundle in `folder`: format, fingerprint, and every file's checksum.

    Raises ManifestError if anything is missing, damaged or altered.
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
        content = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) != file.bytes:
        raise ManifestError(
            f"{path} has {len(content)} bytes, the manifest says {file.bytes}: "
            "the file was altered or cut short; copy or export the bundle again"
        )
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise ManifestError(
            f"{path} does not match its checksum: the file was altered or damaged; "
            "copy or export the bundle again"
        )
