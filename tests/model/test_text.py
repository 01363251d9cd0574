"""Text: documents end with byte 0, and one file at most lies on both sides of the split."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.data import END_OF_TEXT, DataError, Dataset
from model.text import python_dataset, text_dataset


def write_files(folder: Path, count: int) -> list[Path]:
    files = []
    for number in range(count):
        files.append(folder / f"{number}.txt")
        files[-1].write_text(f"file {number} says é{'!' * number}\n", encoding="utf-8")
    return files


def split(files: list[Path], heldout: float = 0.25, seed: int = 0) -> Dataset:
    dataset, _ = split_one(files, heldout, seed)
    return dataset


def split_one(files: list[Path], heldout: float, seed: int = 0) -> tuple[Dataset, Path | None]:
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


@given(
    st.lists(st.text("aé€😀\n", max_size=60), min_size=1, max_size=8),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_the_share_is_of_bytes(texts: list[str], heldout: float, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}" for number in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            file.write_bytes(text.encode())
        whole = sum(len(text.encode()) for text in texts)
        try:
            dataset, cut = split_one(files, heldout, seed)
        except DataError as error:
            assert "too few bytes" in str(error) or "all files are empty" in str(error)
            return
        train, held = documents(dataset.train), documents(dataset.heldout)
        together = sorted(train + held)
        if cut is None:
            assert together == sorted(text.encode() for text in texts)
        else:
            both = train[0] + held[-1]
            assert both == cut.read_bytes()
            assert train[0] and held[-1]
            assert train[0].decode() + held[-1].decode() == both.decode()  # no character is torn
            together.remove(train[0])
            together.remove(held[-1])
            assert sorted([*together, both]) == sorted(text.encode() for text in texts)
        share = sum(map(len, held))
        assert whole * heldout / 2 - 1 <= share <= whole * heldout * 1.5 + 4


def test_one_file_is_split_by_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 100)
    dataset, cut = split_one([tmp_path / "a.txt"], 0.05)
    assert cut == tmp_path / "a.txt"
    assert documents(dataset.train) == [b"0123456789" * 95]
    assert documents(dataset.heldout) == [b"0123456789" * 5]


def test_too_little_to_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"a.txt has too few bytes to hold 25% out"):
        split([tmp_path / "a.txt"])
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="all files are empty"):
        split([tmp_path / "a.txt"])


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
    dataset, _ = python_dataset()
    found = documents(dataset.train) + documents(dataset.heldout)
    assert sorted(found) == sorted(f"# {name}".encode() for name in kept)


def test_this_standard_library_is_enough_to_learn_from() -> None:
    dataset, _ = python_dataset()
    assert len(dataset.train) > 20 * 4096
    assert 0 < len(dataset.heldout) < len(dataset.train) / 5
    assert b"class OrderedDict" in dataset.train.tobytes() + dataset.heldout.tobytes()
