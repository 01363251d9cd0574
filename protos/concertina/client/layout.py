"""What the state of a stream is made of: with it, the size at any position is arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from concertina.v1 import bundle_pb2 as pb

_BYTES: Final = {
    pb.DATA_TYPE_FLOAT32: 4,
    pb.DATA_TYPE_FLOAT16: 2,
    pb.DATA_TYPE_INT8: 1,
    pb.DATA_TYPE_BFLOAT16: 2,
}


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor of a stream's state.

    kind: `stack`, `history` or `recurrent`.
    shape: of one stream, `[heads, entries, head_dim]` for a stack, `[context, …]` for a history.
    unit_bytes: of one entry of a stack, of one row of a history, or of the whole recurrent tensor.
    kept: entries of a stack that are left of a block once it has been folded.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    unit_bytes: int
    kept: int = 1


@dataclass(frozen=True, slots=True)
class Fold:
    """When state folds, and how much of it a fold takes; the bundle's manifest has the details.

    span: tokens of a block. binary: folds carry like a binary counter.
    keep_first, keep_newest: complete blocks that stay as they are.
    """

    span: int
    binary: bool = False
    keep_first: int = 0
    keep_newest: int = 0


def tensors_of(manifest: pb.Manifest) -> tuple[StateTensor, ...]:
    """The state tensors of a bundle."""
    grown = {pb.STATE_KIND_STACK: ("stack", 1), pb.STATE_KIND_HISTORY: ("history", 0)}
    made = []
    for tensor in manifest.state:
        shape = tuple(tensor.shape)
        kind, axis = grown.get(tensor.kind, ("recurrent", None))
        unit = shape if axis is None else (*shape[:axis], *shape[axis + 1 :])
        size = math.prod(unit) * _BYTES.get(tensor.data_type, 0)
        kept = tensor.kept if tensor.HasField("kept") else 1
        made.append(StateTensor(tensor.name, kind, shape, size, kept))
    return tuple(made)


def fold_of(manifest: pb.Manifest) -> Fold | None:
    """When the state of a bundle folds; None if it never does."""
    if not manifest.HasField("fold"):
        return None
    fold = manifest.fold
    return Fold(fold.span, fold.binary, fold.keep_first, fold.keep_newest)
