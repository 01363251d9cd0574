"""Servers are killed under their streams, and no stream shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.scenarios.chaos import run

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
    result = run(BUNDLE, KILLS, STREAMS, TOKENS, ray=ray, seed=1)
    assert result.wrong == []
    assert result.kills == KILLS
    assert result.killed_at_once == 1
    assert result.streams >= STREAMS
    assert result.resumed >= STREAMS  # at least those of the last kill, which takes both
