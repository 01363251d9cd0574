"""Servers are killed under their streams, or their store fails, and no stream shows it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from loadtest.scenarios.bucket import Trouble
from loadtest.scenarios.chaos import run
from tests.checkpoints import quantise_tiny
from tests.once import one_at_a_time

BUNDLE = Path(__file__).parents[2] / "bundles" / "python-4k"
STREAMS, TOKENS, KILLS = 32, 2_000, 4


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "ray",
    [
        pytest.param(False, id="processes", marks=pytest.mark.slow),
        pytest.param(True, id="ray", marks=pytest.mark.chaos),
    ],
)
def test_every_stream_is_what_it_would_have_been(ray: bool) -> None:
    result, _ = run(BUNDLE, KILLS, STREAMS, TOKENS, ray=ray)
    assert result.wrong == []
    assert result.kills == KILLS
    assert result.killed_at_once == 1
    assert result.streams >= STREAMS
    assert result.not_durable == 0
    assert result.resumed >= STREAMS  # at least those of the last kill, which takes both


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kills", [0, 2])
def test_a_store_that_fails_changes_no_stream(kills: int) -> None:
    # It refuses, loses answers twice, and refuses again, each for a few seconds.
    result, bucket = run(BUNDLE, kills, 8, 400, store_fails=True, seconds=30, seed=10)
    assert result.wrong == []
    assert result.kills == kills
    assert result.streams >= 8
    assert result.not_durable > 0
    assert kills or not result.lost
    assert bucket is not None
    assert {Trouble.REFUSES, Trouble.LOSES} < bucket.requests.keys()


@pytest.fixture(scope="session")
def few_bits(tiny_bundles: Path) -> Path:
    """The bundle with matrices of 8 bits."""
    copy = tiny_bundles / BUNDLE.name
    with one_at_a_time(copy):
        if not copy.exists():
            shutil.copytree(BUNDLE, copy)
    return quantise_tiny(copy, 8)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_kill_changes_no_stream_of_few_bits(few_bits: Path) -> None:
    """Their kernels round, so a resumed stream has to be computed as it would have been."""
    result, _ = run(few_bits, 2, 7, 500)
    assert result.wrong == []
    assert (result.kills, result.killed_at_once) == (2, 1)
    assert result.streams >= 7
    assert result.resumed >= 7
