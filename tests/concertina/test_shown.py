"""Values as messages show them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from concertina.shown import MOST_CHARACTERS, cut, listed, shown


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "value",
    [
        "x" * 1_000_000,
        b"x" * 1_000_000,
        [1] * 1_000_000,
        {str(n): n for n in range(100_000)},
        [[["x" * 1000] * 100] * 100] * 100,
        10**4000,
        10**5000,
        np.zeros((1000, 1000)),
        Broken(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_is_short_and_soon_shown(value: Any) -> None:
    began = time.perf_counter()
    assert len(shown(value)) <= 150
    assert time.perf_counter() - began < 0.5


def test_what_is_short_is_shown_as_it_is() -> None:
    for value in ("a", -1, None, 1.5, [1, 2], {"a": 1}, (), b"\x00"):
        assert shown(value) == repr(value)


def test_of_what_is_long_the_length_is_shown() -> None:
    assert shown([7] * 200_000) == "[7, 7, 7, 7, 7, 7, ...] (length 200,000)"
    assert shown("ab" * 500).endswith("ab' (length 1,000)")


def test_a_message_is_cut() -> None:
    assert cut("x" * MOST_CHARACTERS) == "x" * MOST_CHARACTERS
    assert cut("x" * 5000) == "x" * (MOST_CHARACTERS - 1) + "…"


def test_of_many_names_the_first_are_listed() -> None:
    assert listed([]) == ""
    assert listed(["a", "b"]) == "a, b"
    assert listed(str(n) for n in range(500)).endswith("18, 19 and 480 others")
    assert len(listed(["x" * 10_000] * 10_000)) < 2000
