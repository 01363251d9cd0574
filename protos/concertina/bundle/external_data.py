"""Which files an ONNX graph keeps weights in, besides its own.

An ONNX file is a protobuf message. This walks over it without parsing it: weights are jumped over,
so that a graph of any size takes no memory, and neither onnx nor onnxruntime is needed.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_LARGEST: Final = 4_000_000  # parts of a graph to look at; that takes seconds, and ours have 1e4
_DEEPEST: Final = 64

# Fields of onnx.proto that lead to a tensor, by message: number of the field, message in it.
_FIELDS: Final = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
_KEY, _VALUE = 1, 2
_LOCATION = b"location"
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5


class GraphError(Exception):
    """A file that is no ONNX graph, or a graph with more parts than any that is meant well."""


def external_files(path: Path) -> set[str]:
    """The files, as the graph writes them, that onnxruntime would read weights from.

    Raises GraphError, and OSError if the file cannot be read.
    """
    if not path.stat().st_size:
        raise GraphError("the file is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        walk = _Walk(content)
        walk.into("model", 0, len(content), 0)
        return walk.found


class _Walk:
    """What was found so far, and how many parts have been looked at."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._parts = 0
        self.found: set[str] = set()

    def into(self, message: str, begin: int, end: int, depth: int) -> None:
        """Look at the message from `begin` to `end`."""
        if depth > _DEEPEST:
            raise GraphError(f"graphs lie more than {_DEEPEST} deep in each other")
        leads = _FIELDS[message]
        entry: dict[int, bytes] = {}
        for field, first, last in self._fields(begin, end):
            if message == "entry" and field in (_KEY, _VALUE):
                entry[field] = self._content[first:last]
            elif field in leads:
                self.into(leads[field], first, last, depth + 1)
        if entry.get(_KEY) == _LOCATION:
            self.found.add(entry.get(_VALUE, b"").decode(errors="backslashreplace"))

    def _fields(self, at: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Number, begin and end of each field that has a length."""
        while at < end:
            self._parts += 1
            if self._parts > _LARGEST:
                raise GraphError(f"it has more than {_LARGEST:,} parts")
            key, at = self._varint(at, end)
            kind = key & 7
            if kind == _LENGTH:
                size, at = self._varint(at, end)
                if size > end - at:
                    raise GraphError("a part is longer than what it is a part of")
                yield key >> 3, at, at + size
                at += size
            elif kind == _VARINT:
                _, at = self._varint(at, end)
            elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
                at += 8 if kind == _EIGHT_BYTES else 4
            else:
                raise GraphError(f"it has a field of the unknown kind {kind}")
        if at > end:
            raise GraphError("a number is cut off")

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        number = 0
        for place in range(at, min(at + 10, end)):
            byte = self._content[place]
            number |= (byte & 127) << (7 * (place - at))
            if byte < 128:
                return number, place + 1
        raise GraphError("a number is cut off")
