from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

import server.bundles.scanner
from server.bundles.scanner import BundleScanner
from tests.server.bundle_folders import damage, put


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folder of each bundle read, in order."""
    read: list[Path] = []
    load = server.bundles.scanner.load_bundle
    monkeypatch.setattr(
        "server.bundles.scanner.load_bundle", lambda folder: (read.append(folder), load(folder))[1]
    )
    return read


def test_the_first_scan_accepts_what_it_finds(image_bundle: Path, tmp_path: Path) -> None:
    put(image_bundle, tmp_path / "one")
    (tmp_path / "notes.txt").write_text("no folder")
    (tmp_path / "empty").mkdir()
    put(image_bundle, tmp_path / ".hidden")
    assert {path.name: b.name for path, b in BundleScanner(tmp_path).scan().items()} == {
        "one": "tiny-image"
    }


def test_nothing_is_read_twice(image_bundle: Path, tmp_path: Path, reads: list[Path]) -> None:
    put(image_bundle, tmp_path / "one")
    scanner = BundleScanner(tmp_path)
    first = scanner.scan()
    assert scanner.scan() == scanner.scan() == first
    assert reads == [tmp_path / "one"]
    put(image_bundle, tmp_path / "one", version="2")
    scanner.scan()
    assert scanner.scan() != first
    assert reads == [tmp_path / "one"] * 2


def test_a_copy_under_way_is_not_read(
    image_bundle: Path, tmp_path: Path, reads: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The manifest is copied first; every scan finds more of the graph."""
    scanner = BundleScanner(tmp_path)
    scanner.scan()
    (tmp_path / "one").mkdir()
    shutil.copy(image_bundle / "manifest.json", tmp_path / "one")
    whole = (image_bundle / "step.onnx").read_bytes()
    for size in range(0, len(whole), len(whole) // 4):
        (tmp_path / "one" / "step.onnx").write_bytes(whole[:size])
        assert not scanner.scan()
    shutil.copytree(image_bundle, tmp_path / "one", dirs_exist_ok=True)
    assert not scanner.scan() and not reads
    assert list(scanner.scan()) == reads == [tmp_path / "one"]
    assert not caplog.records


def test_a_damaged_bundle_is_logged_once_and_read_again_after_a_change(
    image_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(image_bundle, tmp_path / "one")
    damage(tmp_path / "one")
    scanner = BundleScanner(tmp_path)
    assert not any(scanner.scan() for _ in range(3))
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "step.onnx has" in record.getMessage()
    put(image_bundle, tmp_path / "one")
    assert not scanner.scan()
    assert list(scanner.scan()) == [tmp_path / "one"]
    damage(tmp_path / "one")  # the last valid bundle stays
    assert [list(scanner.scan()) for _ in range(3)] == [[tmp_path / "one"]] * 3
    assert len(caplog.records) == 2


def test_a_renamed_folder_never_disappears(image_bundle: Path, tmp_path: Path) -> None:
    put(image_bundle, tmp_path / "one")
    scanner = BundleScanner(tmp_path)
    scanner.scan()
    (tmp_path / "one").rename(tmp_path / "two")
    scans = [[path.name for path in scanner.scan()] for _ in range(3)]
    assert scans == [["one"], ["two"], ["two"]]
    shutil.rmtree(tmp_path / "two")
    assert [[path.name for path in scanner.scan()] for _ in range(3)] == [["two"], [], []]


def test_without_its_manifest_a_bundle_is_gone(image_bundle: Path, tmp_path: Path) -> None:
    put(image_bundle, tmp_path / "one")
    scanner = BundleScanner(tmp_path)
    scanner.scan()
    (tmp_path / "one" / "manifest.json").unlink()
    assert [bool(scanner.scan()) for _ in range(3)] == [True, False, False]


def test_a_directory_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    scanner = BundleScanner(tmp_path / "nowhere")
    with pytest.raises(OSError, match="nowhere"):
        scanner.scan()
