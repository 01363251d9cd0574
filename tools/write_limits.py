"""Writes the table of the bounds of all requests into docs/api.md, from the protos.

python -m tools.write_limits           writes
python -m tools.write_limits --check   fails if the table is stale
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from concertina.v1 import (
    generation_service_pb2,
    limits_pb2,
    model_service_pb2,
    session_service_pb2,
)
from server.api.limits import is_duration, is_map, largest_bytes, limits_of, range_of

DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "api.md"
BEGIN: Final = "<!-- The table is made by `make protos`. -->\n"
END: Final = "<!-- End of the table. -->\n"
_FILES: Final = (generation_service_pb2, model_service_pb2, session_service_pb2)


def messages() -> list[Descriptor]:
    """The messages of all requests, and those in them, each once."""
    found: dict[str, Descriptor] = {}
    for file in _FILES:
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                _add(method.input_type, found)
    return list(found.values())


def _add(kind: Descriptor, found: dict[str, Descriptor]) -> None:
    if kind.name in found:
        return
    found[kind.name] = kind
    for field in kind.fields:
        inner = field.message_type
        if inner is not None and not is_map(field) and not is_duration(field):
            _add(inner, found)


def table() -> str:
    """The table in Markdown."""
    lines = ["| message | field | bound | and |", "|---|---|---|---|"]
    for kind in messages():
        most = largest_bytes(kind)
        if most:
            lines.append(f"| `{kind.name}` | the whole | {most:,} bytes | |")
        for field in kind.fields:
            if (limits := limits_of(field)) is not None:
                bound = "; ".join(_bounds(field, limits))
                lines.append(f"| `{kind.name}` | `{field.name}` | {bound} | {limits.also} |")
    return "\n".join(lines) + "\n"


def _bounds(field: FieldDescriptor, limits: limits_pb2.Limits) -> Iterator[str]:
    each = ""
    if limits.max_items:
        yield f"{limits.max_items:,} items"
        each = "each "
    if limits.max_bytes:
        least = f"{limits.min_bytes} to " if limits.min_bytes else ""
        yield f"{each}{least}{limits.max_bytes:,} bytes"
    elif allowed := range_of(field, limits):
        yield f"{each}{allowed}{' seconds' if is_duration(field) else ''}"
    elif limits.any:
        yield "any"


def written(document: str) -> str:
    """The document with the table as it is now. Raises ValueError if it has no place for it."""
    before, found, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"docs/api.md has no lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    """Write the table, or check it."""
    document = DOCUMENT.read_text()
    fresh = written(document)
    if "--check" in sys.argv[1:]:
        if fresh != document:
            print("The limits in docs/api.md are stale: run make protos.", file=sys.stderr)
        return int(fresh != document)
    DOCUMENT.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
