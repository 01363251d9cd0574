"""What a stream costs, by arithmetic: against sums by hand, and against what is really held."""

from __future__ import annotations

import numpy as np
import pytest

from concertina.bundle.resources import (
    entries,
    fold_size,
    peak_state_bytes,
    state_bytes,
    step_flops,
    unit_bytes,
)
from concertina.v1 import bundle_pb2 as pb

_COST = pb.Cost(step=1000, step_entry=10, fold=50, fold_entry=5, fold_row=3)


def manifest(span: int | None = None, binary: bool = False) -> pb.Manifest:
    made = pb.Manifest(context=64, cost=_COST)
    if span:
        made.fold.span, made.fold.binary = span, binary
    tensors = (
        ("keys", pb.STATE_KIND_STACK, (2, 9, 8), pb.DATA_TYPE_FLOAT32),
        ("raw", pb.STATE_KIND_HISTORY, (64, 5, 3), pb.DATA_TYPE_FLOAT16),
        ("query", pb.STATE_KIND_RECURRENT, (2, 8), pb.DATA_TYPE_FLOAT32),
    )
    for name, kind, shape, element in tensors:
        made.state.add(name=name, kind=kind, shape=shape, data_type=element)
    return made


@pytest.mark.parametrize(
    ("made", "pushed", "held"),
    [
        (manifest(), 0, 0),
        (manifest(), 13, 13),
        (manifest(4), 3, 3),
        (manifest(4), 4, 1),
        (manifest(4), 13, 4),
        (manifest(2, binary=True), 7, 3),
        (manifest(2, binary=True), 8, 1),
        (manifest(2, binary=True), 13, 3),
    ],
)
def test_state_bytes_by_hand(made: pb.Manifest, pushed: int, held: int) -> None:
    assert entries(made, pushed) == held
    assert state_bytes(made, pushed) == held * 2 * 8 * 4 + pushed * 5 * 3 * 2 + 2 * 8 * 4


def test_caches_in_int8_take_a_quarter() -> None:
    made = manifest(4)
    made.state[0].data_type = pb.DATA_TYPE_INT8
    assert state_bytes(made, 13) == 4 * 2 * 8 + 13 * 5 * 3 * 2 + 2 * 8 * 4


@pytest.mark.parametrize("made", [manifest(), manifest(4), manifest(2, binary=True)])
def test_entries_of_a_batch_are_those_of_its_streams(made: pb.Manifest) -> None:
    pushed = np.arange(64)
    assert entries(made, pushed).tolist() == [entries(made, int(n)) for n in pushed]
    assert state_bytes(made, pushed).tolist() == [state_bytes(made, int(n)) for n in pushed]


@pytest.mark.parametrize(
    ("made", "sizes"),
    [
        (manifest(), {}),
        (manifest(4), {4: (4, 4), 8: (4, 4), 12: (4, 4)}),
        (
            manifest(2, binary=True),
            {2: (2, 2), 4: (3, 4), 6: (2, 2), 8: (4, 8), 10: (2, 2), 12: (3, 4)},
        ),
    ],
)
def test_what_a_due_fold_takes(made: pb.Manifest, sizes: dict[int, tuple[int, int]]) -> None:
    assert {n: size for n in range(14) if (size := fold_size(made, n))[0]} == sizes


@pytest.mark.parametrize("made", [manifest(4), manifest(2, binary=True)])
def test_a_fold_takes_what_the_entries_shrink_by(made: pb.Manifest) -> None:
    for pushed in range(1, 64):
        taken, _ = fold_size(made, pushed)
        grown = entries(made, pushed - 1) + 1
        assert entries(made, pushed) == (grown - taken + 1 if taken else grown)


@pytest.mark.parametrize("made", [manifest(), manifest(1), manifest(4), manifest(2, binary=True)])
def test_the_peak_is_the_most_that_was_ever_held(made: pb.Manifest) -> None:
    """Pushes and folds one by one: what a fold takes is there until it is done."""
    units, most = unit_bytes(made), 0
    assert peak_state_bytes(made, 0) == units["recurrent"]
    for pushed in range(1, 70):
        most = max(most, entries(made, pushed - 1) + 1)
        held = units["stack"] * most + units["history"] * pushed + units["recurrent"]
        assert peak_state_bytes(made, pushed) == held
        assert held >= state_bytes(made, pushed)


def test_a_step_pays_for_what_it_attends_to_and_for_the_fold_it_makes_due() -> None:
    assert step_flops(manifest(), 6) == 1000 + 7 * 10
    assert step_flops(manifest(4), 6) == 1000 + 4 * 10
    assert step_flops(manifest(4), 7) == 1000 + 5 * 10 + 50 + 4 * 5 + 4 * 3
    assert step_flops(manifest(2, binary=True), 7) == 1000 + 4 * 10 + 50 + 4 * 5 + 8 * 3
