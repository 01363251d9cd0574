"""The cost of a stream at any position: bytes of state and operations of a step.

It is computed from the manifest alone: no graph is loaded, and the cost of a stream is known before
the stream starts.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from concertina.v1 import bundle_pb2 as pb

Count = TypeVar("Count", int, npt.NDArray[np.int64])

ELEMENT_TYPES: dict[int, type[np.generic]] = {
    pb.DATA_TYPE_FLOAT32: np.float32,
    pb.DATA_TYPE_FLOAT16: np.float16,
    pb.DATA_TYPE_INT8: np.int8,
}
ELEMENT_BYTES = {key: np.dtype(element).itemsize for key, element in ELEMENT_TYPES.items()}
KIND_NAMES = {
    pb.STATE_KIND_STACK: "stack",
    pb.STATE_KIND_HISTORY: "history",
    pb.STATE_KIND_RECURRENT: "recurrent",
}


def entries(manifest: pb.Manifest, pushed: Count) -> Count:
    """Valid entries of every stack after `pushed` tokens and their folds."""
    if not manifest.HasField("fold"):
        return pushed
    if manifest.fold.binary:
        if isinstance(pushed, np.ndarray):
            return np.bitwise_count(pushed).astype(np.int64)
        return pushed.bit_count()
    return pushed // manifest.fold.span + pushed % manifest.fold.span


def fold_size(manifest: pb.Manifest, pushed: int) -> tuple[int, int]:
    """Entries of each stack and rows of each history that the fold after `pushed` tokens takes.

    `(0, 0)` if no fold is due.
    """
    span = manifest.fold.span
    if not span or not pushed or pushed % span:
        return 0, 0
    if manifest.fold.binary:
        rows = pushed & -pushed
        return rows.bit_length(), rows
    return span, span


def unit_bytes(manifest: pb.Manifest) -> dict[str, int]:
    """Bytes by kind: one entry of every stack, one row of every history, all recurrent tensors."""
    units = dict.fromkeys(KIND_NAMES.values(), 0)
    for tensor in manifest.state:
        shape = list(tensor.shape)
        if tensor.kind == pb.STATE_KIND_STACK:
            del shape[1]
        elif tensor.kind == pb.STATE_KIND_HISTORY:
            del shape[0]
        units[KIND_NAMES[tensor.kind]] += math.prod(shape) * ELEMENT_BYTES[tensor.data_type]
    return units


def state_bytes(manifest: pb.Manifest, pushed: Count) -> Count:
    """Bytes of state that a stream needs after `pushed` tokens."""
    units = unit_bytes(manifest)
    grown = units["stack"] * entries(manifest, pushed) + units["history"] * pushed
    return grown + units["recurrent"]


def peak_state_bytes(manifest: pb.Manifest, pushed: int) -> int:
    """The largest state, in bytes, that a stream needs up to `pushed` tokens.

    A stack is largest just before a fold, after the push of the token that makes the fold due.
    """
    units = unit_bytes(manifest)
    return (
        units["stack"] * peak_entries(manifest, pushed)
        + units["history"] * pushed
        + units["recurrent"]
    )


def peak_entries(manifest: pb.Manifest, pushed: int) -> int:
    """The largest number of entries of a stack up to `pushed` tokens."""
    if not pushed:
        return 0
    if manifest.HasField("fold") and manifest.fold.binary:
        # One more than the most entries before the push: no smaller number has more one bits than
        # 2^k - 1.
        return pushed.bit_length()
    span = manifest.fold.span if manifest.HasField("fold") else pushed
    last_fold = pushed - pushed % span
    return max(entries(manifest, end - 1) + 1 for end in {last_fold or pushed, pushed})


def step_flops(manifest: pb.Manifest, position: int) -> int:
    """Floating-point operations for the token at `position`, and for the fold after it, if due.

    Counts matrix products; a multiply-add is two operations. Positions begin at 0.
    """
    cost = manifest.cost
    flops = cost.step + cost.step_entry * (entries(manifest, position) + 1)
    taken, rows = fold_size(manifest, position + 1)
    if taken:
        flops += cost.fold + cost.fold_entry * taken + cost.fold_row * rows
    return flops
