"""What a client knows of a model's state is what the server computes its size from."""

from __future__ import annotations

import pytest

from concertina.bundle.resources import entry_bytes, unit_bytes
from concertina.client.layout import Fold, fold_of, tensors_of
from concertina.v1 import bundle_pb2 as pb

TENSORS = (
    pb.StateTensor(
        name="keys.0", kind=pb.STATE_KIND_STACK, shape=[2, 9, 4], data_type=pb.DATA_TYPE_FLOAT32
    ),
    pb.StateTensor(
        name="keys.1",
        kind=pb.STATE_KIND_STACK,
        shape=[3, 50, 4],
        data_type=pb.DATA_TYPE_FLOAT16,
        kept=0,
    ),
    pb.StateTensor(
        name="keys.2",
        kind=pb.STATE_KIND_STACK,
        shape=[2, 70, 4],
        data_type=pb.DATA_TYPE_INT8,
        kept=8,
    ),
    pb.StateTensor(
        name="rows", kind=pb.STATE_KIND_HISTORY, shape=[96, 5], data_type=pb.DATA_TYPE_FLOAT16
    ),
    pb.StateTensor(
        name="max", kind=pb.STATE_KIND_RECURRENT, shape=[2, 4], data_type=pb.DATA_TYPE_FLOAT32
    ),
)


def test_units_are_those_of_the_resource_model() -> None:
    manifest = pb.Manifest(state=TENSORS)
    tensors, units = tensors_of(manifest), unit_bytes(manifest)
    for kind in ("stack", "history", "recurrent"):
        assert sum(each.unit_bytes for each in tensors if each.kind == kind) == units[kind] > 0
    by_kept = {each.kept: each.unit_bytes for each in tensors if each.kind == "stack"}
    assert by_kept == entry_bytes(manifest) and set(by_kept) == {0, 1, 8}
    assert [each.shape for each in tensors] == [tuple(each.shape) for each in TENSORS]


@pytest.mark.parametrize(
    ("schedule", "fold"),
    [
        (None, None),
        (pb.FoldSchedule(span=64, resets=True), Fold(64)),
        (pb.FoldSchedule(span=2, binary=True), Fold(2, binary=True)),
        (pb.FoldSchedule(span=8, keep_first=1, keep_newest=3), Fold(8, False, 1, 3)),
    ],
    ids=str,
)
def test_folds(schedule: pb.FoldSchedule | None, fold: Fold | None) -> None:
    assert fold_of(pb.Manifest(fold=schedule)) == fold
