"""The header of a GGUF file: its settings, and where each tensor lies.

The format is in ggml's docs/gguf.md. The `gguf` library knows its block formats, and we take those
from it; but it makes an array of every token's text, which takes it seconds, and it believes every
length in the file.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from concertina.shown import cut, shown
from model.pretrained.source import PretrainedError

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_MOST_FIELDS, _MOST_TENSORS = 4096, 65_536
_MOST_ITEMS = 1 << 21
"""Of all arrays together: a vocabulary has less than half a million tokens, and as many merges."""
_MOST_DIMENSIONS = 4
_MOST_BYTES = 128 << 20
"""Of the header; a vocabulary with its merges has 10 MB."""


@dataclass(frozen=True)
class Stored:
    """A tensor in the file."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """As in PyTorch: rows first."""
    begin: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself."""

    fields: dict[str, Any]
    tensors: dict[str, Stored]


def read_header(path: Path) -> Header:
    """The header of the file at `path`. Raises PretrainedError if it is damaged or too large."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
            return _Reader(path, content).header()
    except (OSError, ValueError) as error:
        if isinstance(error, PretrainedError):
            raise
        raise PretrainedError(f"{path} cannot be read as a GGUF file: {error}") from None


class _Reader:
    """Reads from the beginning to the end, and never past the end of the file."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content = path, content
        self._at, self._items = 0, 0

    def header(self) -> Header:
        if self._take(4) != _MAGIC:
            raise PretrainedError(f"{self._path} is not a GGUF file")
        version = self._number("<I")
        if version not in _VERSIONS:
            raise PretrainedError(f"{self._path} has version {version} of GGUF; 2 and 3 are known")
        tensors = self._at_most("tensors", _MOST_TENSORS)
        fields: dict[str, Any] = {}
        for _ in range(self._at_most("fields", _MOST_FIELDS)):
            name = self._text()
            fields[name] = self._value(self._number("<I"))
        listed = [self._tensor() for _ in range(tensors)]
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise PretrainedError(f"{self._path} has an alignment of {shown(alignment)}")
        begin = -(-self._at // alignment) * alignment
        found = {
            name: Stored(kind, shape, begin + offset, size)
            for name, kind, shape, offset, size in listed
        }
        if len(found) != len(listed):
            raise PretrainedError(f"{self._path} has two tensors of one name")
        for name, stored in found.items():
            if stored.begin + stored.bytes > len(self._content):
                raise PretrainedError(
                    f"{self._path} ends within the tensor {cut(name, 80)}: the file is not complete"
                )
        self._require_apart(found)
        return Header(fields, found)

    def _require_apart(self, found: dict[str, Stored]) -> None:
        """Raise PretrainedError if tensors share bytes: so a small file would be a large model."""
        end = self._at
        for name, stored in sorted(found.items(), key=lambda each: each[1].begin):
            if stored.begin < end and stored.bytes:
                raise PretrainedError(f"{self._path}: the tensor {cut(name, 80)} lies in another")
            end = max(end, stored.begin + stored.bytes)

    def _take(self, size: int) -> bytes:
        if size > len(self._content) - self._at:
            raise PretrainedError(f"{self._path} ends within its header: the file is not complete")
        if self._at + size > _MOST_BYTES:
            raise PretrainedError(
                f"{self._path} has a header of more than {_MOST_BYTES:,} bytes, which is the limit"
            )
        self._at += size
        return self._content[self._at - size : self._at]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _at_most(self, what: str, limit: int) -> int:
        count: int = self._number("<Q")
        if count > limit:
            raise PretrainedError(f"{self._path} has {count:,} {what}; the limit is {limit:,}")
        return count

    def _text(self) -> str:
        return self._take(self._number("<Q")).decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            raise PretrainedError(f"{self._path} has a value of kind {kind}, which is unknown")
        item, count = self._number("<I"), self._number("<Q")
        self._items += count
        if self._items > _MOST_ITEMS:
            raise PretrainedError(
                f"{self._path} has {self._items:,} values in arrays; the limit is {_MOST_ITEMS:,}"
            )
        if item in _SCALARS:
            form = f"<{count}{_SCALARS[item][1]}"
            return list(struct.unpack(form, self._take(struct.calcsize(form))))
        if item != _STRING:
            raise PretrainedError(f"{self._path} has an array of kind {item}, which is unknown")
        return [self._text() for _ in range(count)]

    def _tensor(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int, int]:
        name, dimensions = self._text(), self._number("<I")
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise PretrainedError(
                f"{self._path}: the tensor {cut(name, 80)} has {dimensions} dimensions"
            )
        shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
        number, offset = self._number("<I"), self._number("<Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise PretrainedError(
                f"{cut(name, 80)} is stored as type {number}, which is unknown"
            ) from None
        block, size = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise PretrainedError(
                f"{cut(name, 80)} has rows of {shape[-1]}, and {kind.name} has {block}"
            )
        return name, kind, shape, offset, math.prod(shape) // block * size
