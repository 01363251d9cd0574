"""Changes bundle folders, as an operator does."""

from __future__ import annotations

import shutil
from pathlib import Path

from concertina.bundle.manifest import read_manifest, write_manifest


def put(bundle: Path, folder: Path, version: str = "", graph: bytes = b"") -> str:
    """Replaces `folder` with a copy of a bundle. Returns the fingerprint of the copy.

    version: another version makes another bundle. graph: bytes to replace its step.onnx.
    """
    new = folder.with_name(f".{folder.name}")
    shutil.copytree(bundle, new)
    if version or graph:
        manifest = read_manifest(new)
        manifest.version = version
        if graph:
            (new / "step.onnx").write_bytes(graph)
        write_manifest(new, manifest, [file.path for file in manifest.files])
    if folder.exists():
        shutil.rmtree(folder)
    new.rename(folder)
    return str(read_manifest(folder).fingerprint)


def damage(folder: Path) -> None:
    """Removes the last byte of the step graph."""
    step = folder / "step.onnx"
    step.write_bytes(step.read_bytes()[:-1])
