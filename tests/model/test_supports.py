"""Which tokens a pattern attends to, and in which spans: sets alone, no numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from model.config import Attention
from model.patterns import PATTERNS
from model.patterns.pattern import Support
from tests.model.cases import SPARSE, Case, before

MIXTURES = ("mixture", "mixture-averaged")
SPANS = (2, 3, 5, 8)


def supports(attention: Attention, length: int, span: int) -> list[Support]:
    pattern = Case(attention).make(length, span)
    return [before(length, pattern.support(position)) for position in range(length)]


AXES = (1, 4, 6, 7)
"""Of token 7, in row 2 and column 1 of three columns."""
BLOCKS = ((0, 1, 2), (3, 4, 5))
COLUMNS = ((0, 3), (2, 5))
SIDES = ((0,), (2,), (3,), (5,))


@pytest.mark.parametrize(
    ("attention", "position", "direct", "spans"),
    [
        ("full", 3, (0, 1, 2, 3), ()),
        ("fixed", 5, (3, 4, 5), ((0, 1, 2),)),
        ("fixed", 6, (6,), BLOCKS),
        ("fixed", 7, (6, 7), BLOCKS),
        ("fixed-bidirectional", 4, (3, 4, 5), ((0, 1, 2), (6, 7, 8))),
        ("fixed-bidirectional", 8, (6, 7, 8), BLOCKS),
        ("logsparse", 2, (2,), ((0, 1),)),
        ("logsparse", 5, (5,), ((0, 1, 2, 3), (4,))),
        ("logsparse", 7, (7,), ((0, 1, 2, 3), (4, 5), (6,))),
        ("logsparse", 8, (8,), ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("logsparse-hierarchical", 6, (6,), ((0, 1, 2, 3), (4, 5))),
        ("axial-rowmajor", 7, (6, 7), BLOCKS),
        ("axial-vertical", 2, (0, 1, 2), ()),
        ("axial-vertical", 3, (0, 3), ((1,), (2,))),
        ("axial-vertical", 7, AXES, COLUMNS),
        ("axial-horizontal", 6, (0, 3, 6), ((1, 2), (4, 5))),
        ("axial-horizontal", 7, AXES, SIDES),
        ("axial-horizontal", 8, (2, 5, 6, 7, 8), ((0, 1), (3, 4))),
        ("mixture", 7, AXES, COLUMNS + SIDES),
        ("mixture-averaged", 7, AXES, COLUMNS + SIDES),
        ("sparse-fixed", 7, (2, 5, 6, 7), ()),
        ("sparse-strided", 4, (1, 2, 3, 4), ()),
        ("sparse-strided", 7, (1, 4, 5, 6, 7), ()),
        ("sparse-logsparse", 7, (3, 5, 6, 7), ()),
        ("sparse-logsparse", 8, (0, 4, 6, 7, 8), ()),
        ("sparse-axial", 7, AXES, ()),
    ],
)
def test_written_out(
    attention: Any, position: int, direct: tuple[int, ...], spans: tuple[tuple[int, ...], ...]
) -> None:
    assert supports(attention, 9, 3)[position] == Support(direct, spans)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("attention", PATTERNS)
def test_whom_a_token_sees(attention: Attention, span: int) -> None:
    length = 5 * span + 2
    for position, support in enumerate(supports(attention, length, span)):
        seen = Counter([*support.direct, *(token for one in support.spans for token in one)])
        assert position in support.direct
        if Case(attention) in SPARSE:
            assert not support.spans
            assert set(seen.values()) == {1}
            assert max(seen) == position and min(seen) >= 0
        elif attention in MIXTURES:  # by both partitions, but raw only once
            assert seen == {t: 1 + (t not in support.direct) for t in range(position + 1)}
        else:  # a partition
            whole = length if attention == "fixed-bidirectional" else position + 1
            assert seen == dict.fromkeys(range(whole), 1)


def _axial(i: int, m: int) -> int:
    return i // m + i % m + 1


def _columns(i: int, m: int) -> int:
    return m - 1 if i >= m else 0


def _sides(i: int, m: int) -> int:
    return i // m * ((i % m > 0) + (i % m < m - 1))


ENTRIES: dict[Attention, Callable[[int, int], int]] = {
    "full": lambda i, s: i + 1,
    "fixed": lambda i, s: i % s + 1 + i // s,
    "fixed-bidirectional": lambda i, s: s + 3,  # of four whole blocks
    "logsparse": lambda i, s: 1 + i.bit_count(),
    "logsparse-hierarchical": lambda i, s: 1 + i.bit_count(),
    "axial-rowmajor": lambda i, m: i % m + 1 + i // m,
    "axial-vertical": lambda i, m: _axial(i, m) + _columns(i, m),
    "axial-horizontal": lambda i, m: _axial(i, m) + _sides(i, m),
    "mixture": lambda i, m: _axial(i, m) + _columns(i, m) + _sides(i, m),
    "mixture-averaged": lambda i, m: _axial(i, m) + _columns(i, m) + _sides(i, m),
    "sparse-fixed": lambda i, s: i % s + 1 + i // s,
    "sparse-strided": lambda i, s: min(i + 1, s) + i // s,
    "sparse-logsparse": lambda i, s: 1 + i.bit_length(),
    "sparse-axial": _axial,
}
"""Of position i, for spans of s tokens or rows of m."""


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("attention", PATTERNS)
def test_number_of_entries(attention: Attention, span: int) -> None:
    for position, support in enumerate(supports(attention, 4 * span, span)):
        assert len(support.direct) + len(support.spans) == ENTRIES[attention](position, span)


def test_empty_spans_are_left_out() -> None:
    assert Support.of(range(2), [[], range(2, 4), ()]) == Support((0, 1), ((2, 3),))
