"""Text datasets: a folder of files, split by file."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np

from model.data import END_OF_TEXT, Dataset, DatasetInfo

_NOT_PROSE = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
_NOT_PROSE |= {"encodings", "pydoc_data", "lib2to3"}  # tables and grammars, not ordinary code


def text_dataset(
    files: list[Path], *, source: str, license: str, heldout: float = 0.05, seed: int = 0
) -> Dataset:
    """Bytes of `files`, in an order shuffled with `seed`; `heldout` is the share to hold out.

    Raises ValueError if a file contains byte 0, which marks the end of a document.
    """
    order = np.random.default_rng(seed).permutation(len(files))
    documents = []
    for index in order:
        content = files[index].read_bytes()
        if END_OF_TEXT in content:
            raise ValueError(f"{files[index]} contains byte 0: use text files only")
        documents.append(np.frombuffer(content + bytes([END_OF_TEXT]), np.uint8))
    kept = max(1, round(len(documents) * heldout))
    if len(documents) <= kept:
        raise ValueError(f"cannot hold {kept} of {len(documents)} files out: add more files")
    info = DatasetInfo("text", vocabulary=256, source=source, license=license)
    return Dataset(info, np.concatenate(documents[kept:]), np.concatenate(documents[:kept]))


def python_dataset() -> Dataset:
    """Source code of this interpreter's standard library, without tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _NOT_PROSE.intersection(path.relative_to(root).parts)
        and path.stat().st_size
        and END_OF_TEXT not in path.read_bytes()
    ]
    return text_dataset(files, source="CPython standard library", license="PSF-2.0")
