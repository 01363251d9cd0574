"""What is left of a grid, and what it has to hold."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pairs import covering

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("sizes", [(2,), (3, 2), (2, 2, 2), (12, 2, 3), (2, 3, 4), (3, 3, 3, 3)])
def test_every_two_values_meet(sizes: tuple[int, ...]) -> None:
    rows = list(itertools.product(*map(range, sizes)))
    chosen = [rows[number] for number in covering(rows)]
    assert len(set(chosen)) == len(chosen)
    for one, other in itertools.combinations(range(len(sizes)), 2):
        met = {(row[one], row[other]) for row in chosen}
        assert met == set(itertools.product(range(sizes[one]), range(sizes[other])))
    if len(sizes) > 2:
        assert len(chosen) < len(rows)


def test_only_pairs_that_there_are_have_to_meet() -> None:
    rows = [(0, 0, 0), (0, 1, 1), (1, 0, 1)]
    assert covering(rows) == [0, 1, 2]


CONFTEST = """
from tests.pairs import thin_out

def pytest_collection_modifyitems(items):
    thin_out(items, ["slow"])
"""
TESTS = """
import pytest

@pytest.fixture(params="ab")
def side(request): ...

@pytest.mark.parametrize("x", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("y", "z"), [(1, 2), (1, 3)])
def test_grid(x, y, z, side): ...

@pytest.mark.parametrize(("x", "y", "z"), [(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1)])
def test_table(x, y, z): ...
"""


def test_a_grid_is_thinned_out_and_a_table_is_not(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  slow\n  grid\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not grid"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    # Four of the grid's eight and the four slow ones, and the whole table.
    assert "12 passed, 4 deselected" in ran.stdout, ran.stdout + ran.stderr
