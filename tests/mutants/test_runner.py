"""The bugs still fit the source, and a bug that no test notices is reported."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutants import runner
from tests.mutants.mutant import Mutant
from tests.mutants.runner import ROOT, plant, survey
from tests.mutants.table import MUTANTS

SOUND = """
def twice(x: int) -> int:
    return 2 * x
"""
TEST = """
from model.arithmetic import twice

def test_twice() -> None:
    assert twice(3) == 6
"""
WRONG = Mutant("adds one", "model/arithmetic.py", "2 * x", "2 * x + 1", "tests/test_arithmetic.py")
HARMLESS = replace(WRONG, name="the same", new="x + x")
BROKEN = replace(WRONG, name="does not import", old="def twice", new="1 / 0\ndef twice")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of one function and one test, with every folder that is copied."""
    root = tmp_path / "project"
    for name in runner.SOURCES:
        if not Path(name).suffix:
            (root / name).mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "model" / "__init__.py").touch()  # or an installed package of that name wins
    (root / "model" / "arithmetic.py").write_text(SOUND)
    (root / "tests" / "test_arithmetic.py").write_text(TEST)
    return root


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_bug_applies_to_the_source(mutant: Mutant, tmp_path: Path) -> None:
    (tmp_path / mutant.file).parent.mkdir(parents=True)
    shutil.copy(ROOT / mutant.file, tmp_path / mutant.file)
    plant(tmp_path, mutant)
    assert (tmp_path / mutant.file).read_text() != (ROOT / mutant.file).read_text()
    file, *name = mutant.test.split("::")
    assert all(f"def {each}(" in (ROOT / file).read_text() for each in name)
    assert (ROOT / file).exists()


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize(("old", "count"), [("3 * x", 0), ("x", 2)])
def test_a_patch_that_does_not_fit_once_is_refused(old: str, count: int, project: Path) -> None:
    with pytest.raises(ValueError, match=rf"adds one: model/arithmetic\.py holds .* {count} times"):
        plant(project, replace(WRONG, old=old))


def test_a_patch_that_is_no_python_is_refused(project: Path) -> None:
    with pytest.raises(SyntaxError):
        plant(project, replace(WRONG, new="2 *"))
    assert (project / "model" / "arithmetic.py").read_text() == SOUND


def test_caught_and_unseen_bugs_are_told_apart(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert survey(project, [WRONG], jobs=1)
    assert not survey(project, [WRONG, HARMLESS, BROKEN], jobs=3)
    output = capsys.readouterr().out
    assert output.count("caught  adds one") == 2
    assert "tests/test_arithmetic.py::test_twice" in output
    assert "UNSEEN  the same" in output
    assert "UNSEEN  does not import" in output  # tests that never ran notice nothing
    assert "1 of 3 bugs caught" in output
    assert (project / "model" / "arithmetic.py").read_text() == SOUND


def test_tests_that_fail_without_a_bug_prove_nothing(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "tests" / "test_arithmetic.py").write_text(TEST.replace("6", "7"))
    assert not survey(project, [WRONG], jobs=1)
    output = capsys.readouterr().out
    assert "The tests have to pass without a bug: FAILED tests/test_arithmetic.py" in output


def test_a_run_without_end_is_cut(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "TIME_LIMIT_S", 0.01)
    with runner.warm() as process:
        outcome = runner.run_tests(process, project, [WRONG.test])
    assert not outcome.caught
    assert outcome.code is None
