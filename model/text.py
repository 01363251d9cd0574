"""Text datasets: files, split by file as far as they are small enough."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model.data import END_OF_TEXT, DataError, Dataset, DatasetInfo

PYTHON_SOURCE, PYTHON_LICENSE = "CPython standard library", "PSF-2.0"

_NOT_PROSE = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
_NOT_PROSE |= {"encodings", "pydoc_data", "lib2to3"}  # tables and grammars, not ordinary code


def text_dataset(
    files: list[Path], *, source: str, license: str, heldout: float = 0.05, seed: int = 0
) -> tuple[Dataset, Path | None]:
    """Bytes of `files`, in an order shuffled with `seed`; `heldout` is the share to hold out.

    Whole files are held out, so many that their bytes come nearest to that share. If this is more
    than half away from it, because files are few and large, one of them is split: its end is held
    out. This one is returned.
    Raises DataError if a file contains byte 0, which marks the end of a document, or there is too
    little to hold any of it out.
    """
    order = np.random.default_rng(seed).permutation(len(files))
    documents = [_document(files[index]) for index in order]
    wanted = heldout * sum(map(len, documents))
    ends = np.cumsum([0, *map(len, documents)])
    if not ends[-1]:
        raise DataError(f"all files are empty ({len(files)}): there is nothing to learn")
    kept = int(np.abs(ends[:-1] - wanted).argmin())
    train, held, cut = documents[kept:], documents[:kept], None
    if abs(ends[kept] - wanted) > wanted / 2:
        kept = int(np.searchsorted(ends, wanted, side="right")) - 1
        cut = files[order[kept]]
        front, end = _cut(documents[kept], round(wanted - ends[kept]))
        if not front or not end:
            raise DataError(f"{cut} has too few bytes to hold {heldout:.0%} out: add more text")
        train, held = [front, *documents[kept + 1 :]], [*documents[:kept], end]
    info = DatasetInfo("text", vocabulary=256, source=source, license=license)
    return Dataset(info, _joined(train), _joined(held)), cut


def _document(file: Path) -> bytes:
    content = file.read_bytes()
    if END_OF_TEXT in content:
        raise DataError(f"{file} contains byte 0: use text files only")
    return content


def _cut(document: bytes, held: int) -> tuple[bytes, bytes]:
    """A document without its last `held` bytes, or a few more, and these; no character is torn."""
    at = len(document) - held
    while 0 < at < len(document) and document[at] & 0xC0 == 0x80:
        at -= 1
    return document[:at], document[at:]


def _joined(documents: list[bytes]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(each + bytes([END_OF_TEXT]) for each in documents), np.uint8)


def python_dataset(*, heldout: float = 0.05, seed: int = 0) -> tuple[Dataset, Path | None]:
    """Source code of this interpreter's standard library, without tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _NOT_PROSE.intersection(path.relative_to(root).parts)
        and path.stat().st_size
        and END_OF_TEXT not in path.read_bytes()
    ]
    return text_dataset(
        files, source=PYTHON_SOURCE, license=PYTHON_LICENSE, heldout=heldout, seed=seed
    )
