"""Grids of three parameters and more: enough of one that every two values meet in some test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any

import pytest


def covering(rows: Sequence[Sequence[Hashable]]) -> list[int]:
    """Numbers of `rows` which hold, of every two columns, all pairs of values that any row holds.

    Always the one next that adds the most; of several, the first.
    """
    pairs = [set(combinations(enumerate(row), 2)) for row in rows]
    left, chosen = set[Any]().union(*pairs), list[int]()
    while left:
        chosen.append(max(range(len(rows)), key=lambda row: len(pairs[row] & left)))
        left -= pairs[chosen[-1]]
    return chosen


def thin_out(items: Sequence[pytest.Item], left_out: Sequence[str]) -> None:
    """Mark as `grid` those of a full grid without which every two of its values still meet.

    Tests marked with one of `left_out` belong to no grid.
    """
    tests = defaultdict[Any, list[tuple[pytest.Item, list[tuple[int, ...]]]]](list)
    for item in items:
        if not any(map(item.get_closest_marker, left_out)) and len(row := _values(item)) > 2:
            tests[item.parent, getattr(item, "originalname", item.name)].append((item, row))
    for grid in tests.values():
        chosen = covering([row for _, row in grid])
        for number, (item, _) in enumerate(grid):
            if number not in chosen:
                item.add_marker("grid")


def _values(item: pytest.Item) -> list[tuple[int, ...]]:
    """What a test got of each `parametrize` and of each parametrised fixture, by identity."""
    params: dict[str, object] = getattr(getattr(item, "callspec", None), "params", {})
    together = [_names(mark.args[0]) for mark in item.iter_markers("parametrize")]
    alone = [[name] for name in params if not any(name in names for names in together)]
    return [tuple(id(params[name]) for name in names) for names in [*together, *alone]]


def _names(names: str | Sequence[str]) -> list[str]:
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
