"""The command `data` as a person meets it: what it says, and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from concertina.cli.main import main
from model.data import load_dataset

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `concertina data` in a folder of its own: exit code, and what it says in one line."""
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["concertina", "data", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        assert isinstance(exit.value.code, int)
        out, err = capsys.readouterr()
        assert not out
        return exit.value.code, " ".join(err.replace("│", " ").split())

    return run


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    (folder / "old").mkdir(parents=True)
    for name in ("a.md", "b.md", "old/c.md", "d.rst", "Makefile"):
        (folder / name).write_text(f"{name}: one line of some length\n" * 20)
    return folder


@pytest.fixture
def icons(tmp_path: Path) -> Path:
    folder = tmp_path / "icons"
    folder.mkdir()
    for number in range(10):
        image = Image.new("RGB", (4, 4), "white")
        image.paste("red", (0, 0, 1 + number % 3, 4))
        image.save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["text"], 2, "--from: text needs a folder or a file to read"),
        (["images"], 2, "--from: images needs a folder to read"),
        (["text", "--from", "nowhere"], 2, "--from: nowhere does not exist"),
        (["images", "--from", "nowhere"], 2, "--from: nowhere does not exist"),
        (["images", "--from", "notes/a.md"], 2, "--from: notes/a.md is a file; images are read"),
        (
            ["text", "--from", "notes"],
            2,
            "--pattern: no file below notes matches '*.txt'; "
            "there are 3 *.md, 1 without an ending, 1 *.rst",
        ),
        (["text", "--from", "notes", "--pattern", "/etc/*"], 2, "--pattern: '/etc/*' is not a"),
        (["text", "--from", "notes", "--pattern", "**a"], 2, "--pattern: '**a' is not a pattern"),
        (["text", "--from", "empty"], 2, "--from: empty has no files"),
        (["images", "--from", "notes"], 1, "notes has no images (.bmp, .gif"),
        (["python", "--from", "notes"], 2, "--from: is for your own data, text and images"),
        (["emoji", "--license", "MIT"], 2, "--license: is for your own data"),
        (["text", "--from", "notes", "--heldout", "0"], 2, "'--heldout': 0.0 is not a share"),
        (["text", "--from", "notes", "--heldout", "1"], 2, "'--heldout': 1.0 is not a share"),
        (["text", "--from", "notes", "--heldout", "nan"], 2, "'--heldout': nan is not a share"),
        (["text", "--from", "notes", "--seed", "-1"], 2, "--seed"),
        (["images", "--from", "notes", "--width", "0"], 2, "--width"),
        (["images", "--from", "notes", "--height", "100000"], 2, "--height"),
    ],
)
def test_each_mistake_has_its_own_words(
    run: Run, notes: Path, arguments: list[str], code: int, named: str
) -> None:
    (notes.parent / "empty").mkdir()
    kind, *options = arguments
    exit, said = run(kind, "data", *options)
    assert named in said
    assert exit == code
    assert not Path("data").exists()


def test_text_of_a_folder_and_of_one_file(run: Run, notes: Path) -> None:
    total = sum(len(path.read_bytes()) for path in notes.rglob("*.md"))
    options = ["--pattern", "*.md", "--heldout", "0.34"]
    code, said = run("text", "data", "--from", "notes", *options)
    assert code == 0
    assert "held out" in said and "split" not in said
    dataset = load_dataset(Path("data"))
    assert len(dataset.train) + len(dataset.heldout) == total + 3
    assert (dataset.info.source, dataset.info.license) == ("notes", "unknown")
    code, said = run("text", "one", "--from", "notes/a.md", "--heldout", "0.1", "--license", "MIT")
    assert code == 0
    assert "held out; notes/a.md is split: its end is held out" in said
    assert load_dataset(Path("one")).info.license == "MIT"


def test_mirror_images_are_said_and_can_be_left_out(run: Run, icons: Path) -> None:
    options = ["--from", "icons", "--width", "4", "--height", "4", "--heldout", "0.2"]
    assert run("images", "data", *options) == (
        0,
        "data: 16 images to train on, 2 held out; 2 colours; "
        "8 are mirror images (--no-mirror adds none)",
    )
    assert run("images", "plain", *options, "--no-mirror") == (
        0,
        "plain: 8 images to train on, 2 held out; 2 colours",
    )
    mirrored, plain = (load_dataset(Path(name)) for name in ("data", "plain"))
    assert np.array_equal(mirrored.train[:8], plain.train)


def test_the_folder_that_is_here_has_a_name(
    run: Run, icons: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(icons)
    assert run("images", "../data", "--from", ".")[0] == 0
    info = load_dataset(Path("../data")).info
    assert (info.source, info.labels) == ("icons", ("icons",))


def test_only_a_dataset_of_the_same_data_is_replaced(run: Run, notes: Path, icons: Path) -> None:
    options = ["--from", "notes", "--pattern", "*.md"]
    assert run("text", "data", *options)[0] == 0
    assert run("text", "data", *options, "--heldout", "0.5")[0] == 0
    before = {path: path.read_bytes() for path in Path("data").iterdir()}
    code, said = run("images", "data", "--from", "icons")
    assert code == 1
    assert "data holds a dataset of text from notes, which one of image from icons would" in said
    assert "name a new folder, or delete it first" in said
    assert run("text", "data", "--from", "icons", "--pattern", "*.png")[0] == 1
    assert run("python", "data")[0] == 1
    assert {path: path.read_bytes() for path in Path("data").iterdir()} == before
    code, said = run("text", "notes", *options)
    assert (code, "notes exists and is not a dataset" in said) == (1, True)
    code, said = run("text", "notes/a.md", *options)
    assert (code, "notes/a.md exists and is not a dataset" in said) == (1, True)
    assert len(list(notes.rglob("*.md"))) == 3
    Path("new").mkdir()
    assert run("text", "new", *options)[0] == 0
