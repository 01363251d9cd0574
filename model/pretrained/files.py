"""Files of the folder of a pretrained model, which may have come from anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.pretrained.source import PretrainedError

_MOST_BYTES = 32 << 20
_MOST_ITEMS = 1_000_000


def find_file(folder: Path, name: str) -> Path | None:
    """The path of a file of the folder; None if there is none of this name.

    A link may lead to another file of the folder or, in the cache of a hub, to what other versions
    of the model share with it; but nowhere else, since bundles are given to others. Raises
    PretrainedError.
    """
    path, root = folder / name, folder.resolve()
    if not path.exists():
        return None
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if not path.resolve().is_relative_to(root):
        raise PretrainedError(f"{path} is a link that leads out of the folder: copy the file to it")
    if not path.is_file():
        raise PretrainedError(f"{path} is no file")
    return path


def read_file(path: Path, most_bytes: int) -> bytes:
    """The content of a file. Raises PretrainedError if it is too large."""
    try:
        if (size := path.stat().st_size) > most_bytes:
            raise PretrainedError(f"{path} has {size:,} bytes, the limit is {most_bytes:,}")
        return path.read_bytes()
    except OSError as error:
        raise PretrainedError(f"{path} cannot be read: {error.strerror}") from None


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file. Raises PretrainedError if there is none, or it is too large."""
    path = find_file(folder, name)
    if path is None:
        raise PretrainedError(f"{folder} has no {name}: it is not a whole model")
    written = read_file(path, _MOST_BYTES)
    if (items := sum(map(written.count, (b",", b"[", b"{")))) > _MOST_ITEMS:
        raise PretrainedError(f"{path} has about {items:,} items, the limit is {_MOST_ITEMS:,}")
    try:
        content = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise PretrainedError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise PretrainedError(f"{path} is not a JSON object")
    return content
