"""Text: documents end with byte 0, and no file lies on both sides of the split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from model.data import END_OF_TEXT, Dataset
from model.text import python_dataset, text_dataset


def write_files(folder: Path, count: int) -> list[Path]:
    files = []
    for number in range(count):
        files.append(folder / f"{number}.txt")
        files[-1].write_text(f"file {number} says é{'!' * number}\n", encoding="utf-8")
    return files


def split(files: list[Path], heldout: float = 0.25, seed: int = 0) -> Dataset:
    return text_dataset(files, source="test", license="CC0-1.0", heldout=heldout, seed=seed)


def documents(run: npt.NDArray[np.uint8]) -> list[bytes]:
    assert run.dtype == np.uint8
    assert run[-1] == END_OF_TEXT
    return run.tobytes().split(b"\0")[:-1]


def test_every_file_is_whole_on_one_side(tmp_path: Path) -> None:
    files = write_files(tmp_path, 12)
    dataset = split(files)
    train, heldout = documents(dataset.train), documents(dataset.heldout)
    assert len(heldout) == 3
    assert sorted(train + heldout) == sorted(path.read_bytes() for path in files)
    assert (dataset.info.modality, dataset.info.vocabulary) == ("text", 256)
    assert (dataset.info.source, dataset.info.license) == ("test", "CC0-1.0")


def test_the_seed_alone_decides_the_split(tmp_path: Path) -> None:
    files = write_files(tmp_path, 12)
    one, same, other = (split(files, seed=seed).heldout.tobytes() for seed in (0, 0, 1))
    assert one == same != other


def test_at_least_one_file_is_held_out(tmp_path: Path) -> None:
    assert len(documents(split(write_files(tmp_path, 3), heldout=0.01).heldout)) == 1


def test_too_few_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot hold 1 of 1 files out"):
        split(write_files(tmp_path, 1))


def test_a_file_with_byte_0_is_named(tmp_path: Path) -> None:
    files = write_files(tmp_path, 4)
    files[2].write_bytes(b"ELF\0")
    with pytest.raises(ValueError, match=f"{files[2]} contains byte 0"):
        split(files)


def test_the_standard_library_without_its_tests_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [f"kept_{number}.py" for number in range(20)] + ["json/kept.py", "test_not_a_folder.py"]
    left = ["test/a.py", "json/tests/a.py", "idlelib/idle_test/a.py", "site-packages/a/b.py"]
    left += ["encodings/a.py", "lib2to3/a.py", "notes.txt"]
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / "empty.py").touch()
    (tmp_path / "binary.py").write_bytes(b"\0")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    dataset = python_dataset()
    found = documents(dataset.train) + documents(dataset.heldout)
    assert sorted(found) == sorted(f"# {name}".encode() for name in kept)


def test_this_standard_library_is_enough_to_learn_from() -> None:
    dataset = python_dataset()
    assert len(dataset.train) > 20 * 4096
    assert 0 < len(dataset.heldout) < len(dataset.train) / 5
    assert b"class OrderedDict" in dataset.train.tobytes() + dataset.heldout.tobytes()
