"""The state tensors of a bundle, out of its manifest."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import numpy as np

from concertina.bundle.resources import ELEMENT_TYPES, kept_entries
from concertina.v1 import bundle_pb2 as pb


class StateKind(enum.Enum):
    """How steps and folds change a tensor."""

    STACK = pb.STATE_KIND_STACK
    """`[heads, entries, head_dim]`: a step pushes an entry, a fold puts one in place of many."""
    HISTORY = pb.STATE_KIND_HISTORY
    """`[context, …]`: a step writes a row, a fold rewrites rows."""
    RECURRENT = pb.STATE_KIND_RECURRENT
    """Any shape: a step changes any of it."""


@dataclass(frozen=True)
class StateTensor:
    """One tensor of what a stream keeps; its shape is that of one stream."""

    name: str
    kind: StateKind
    shape: tuple[int, ...]
    element: type[np.generic]
    initial: float
    kept: int = 1
    """Of a stack: entries that are left of a folded block. The span: it is never folded."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * np.dtype(self.element).itemsize


def state_tensors(manifest: pb.Manifest) -> tuple[StateTensor, ...]:
    """The tensors that a verified manifest names, in its order."""
    return tuple(
        StateTensor(
            tensor.name,
            StateKind(tensor.kind),
            tuple(tensor.shape),
            ELEMENT_TYPES[tensor.data_type],
            tensor.initial,
            kept_entries(tensor),
        )
        for tensor in manifest.state
    )
