"""JSON files beside the weights of a pretrained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.pretrained.source import PretrainedError

_MOST_BYTES = 32 << 20


def read_json(path: Path, most_bytes: int = _MOST_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Raises PretrainedError if there is none, or it is too large."""
    try:
        if path.stat().st_size > most_bytes:
            raise PretrainedError(
                f"{path} has {path.stat().st_size:,} bytes, the limit is {most_bytes:,}"
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PretrainedError(
            f"{path.parent} has no {path.name}: it is not a whole model"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise PretrainedError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise PretrainedError(f"{path} is not a JSON object")
    return content
