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


def entries(manifest: pb.Manifest, pushed: Count, kept: int = 1) -> Count:
    """Valid entries of a stack after `pushed` tokens and their folds.

    kept: how many are left of a folded block; see `StateTensor.kept`.
    """
    if not manifest.HasField("fold"):
        return pushed
    if manifest.fold.binary:
        if isinstance(pushed, np.ndarray):
            return np.bitwise_count(pushed).astype(np.int64)
        return pushed.bit_count()
    fold = manifest.fold
    left = pushed // fold.span - fold.keep_first - fold.keep_newest
    if isinstance(pushed, np.ndarray):
        dropped: npt.NDArray[np.int64] = np.maximum(left, 0) * (fold.span - kept)
        return pushed - dropped
    return pushed - max(left, 0) * (fold.span - kept)


def kept_entries(tensor: pb.StateTensor) -> int:
    """Entries of a stack that are left of a folded block."""
    return tensor.kept if tensor.HasField("kept") else 1


def fold_size(manifest: pb.Manifest, pushed: int) -> tuple[int, int]:
    """Entries of each stack and rows of each history that the fold after `pushed` tokens takes.

    `(0, 0)` if no fold is due.
    """
    fold = manifest.fold
    if not fold.span or not pushed or pushed % fold.span:
        return 0, 0
    if fold.binary:
        rows = pushed & -pushed
        return rows.bit_length(), rows
    if pushed // fold.span <= fold.keep_first + fold.keep_newest:
        return 0, 0
    return fold.span * (1 + fold.keep_newest), fold.span


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


def entry_bytes(manifest: pb.Manifest) -> dict[int, int]:
    """Bytes of one entry of all stacks, by how many entries they keep of a folded block."""
    units: dict[int, int] = {}
    for tensor in manifest.state:
        if tensor.kind == pb.STATE_KIND_STACK:
            shape, kept = list(tensor.shape), kept_entries(tensor)
            size = math.prod((shape[0], *shape[2:])) * ELEMENT_BYTES[tensor.data_type]
            units[kept] = units.get(kept, 0) + size
    return units


def state_bytes(manifest: pb.Manifest, pushed: Count) -> Count:
    """Bytes of state that a stream needs after `pushed` tokens."""
    units = unit_bytes(manifest)
    grown = units["history"] * pushed + units["recurrent"]
    for kept, size in entry_bytes(manifest).items():
        grown = grown + size * entries(manifest, pushed, kept)
    return grown


def peak_state_bytes(manifest: pb.Manifest, pushed: int) -> int:
    """The largest state, in bytes, that a stream needs up to `pushed` tokens.

    A stack is largest just before a fold, after the push of the token that makes the fold due.
    """
    units = unit_bytes(manifest)
    stacks = entry_bytes(manifest).items()
    return (
        sum(size * peak_entries(manifest, pushed, kept) for kept, size in stacks)
        + units["history"] * pushed
        + units["recurrent"]
    )


def peak_entries(manifest: pb.Manifest, pushed: int, kept: int = 1) -> int:
    """The largest number of entries of a stack up to `pushed` tokens; `kept`: see `entries`."""
    if not pushed:
        return 0
    if manifest.HasField("fold") and manifest.fold.binary:
        # One more than the most entries before the push: no smaller number has more one bits than
        # 2^k - 1.
        return pushed.bit_length()
    span = manifest.fold.span if manifest.HasField("fold") else pushed
    last_fold = pushed - pushed % span
    return max(entries(manifest, end - 1, kept) + 1 for end in {last_fold or pushed, pushed})


def step_flops(manifest: pb.Manifest, position: int) -> int:
    """Floating-point operations for the token at `position`, and for the fold after it, if due.

    Counts matrix products; a multiply-add is two operations. Positions begin at 0.
    """
    cost = manifest.cost
    stacks = [kept_entries(t) for t in manifest.state if t.kind == pb.STATE_KIND_STACK]
    attended = sum(entries(manifest, position, kept) + 1 for kept in stacks)
    # All layers have the same shape, so that an entry costs the same in each of them.
    flops = cost.step + cost.step_entry * attended // max(1, len(stacks))
    taken, rows = fold_size(manifest, position + 1)
    if taken:
        flops += cost.fold + cost.fold_entry * taken + cost.fold_row * rows
    return flops
