"""Two graphs that move state inside the memory of a device, which NumPy cannot access.

`take.onnx` copies parts of some rows out of the buffers; `put.onnx` writes such parts into rows, in
place. They need no weights, only the shapes of the state.

Shapes: buffers have `S` rows, of which `B` are read or written; a part has `n` entries of each
stack and `m` rows of each history. Stacks that keep k entries of a folded block, other than 1, have
indices and an `n` of their own, `entries.k`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from concertina.bundle.resources import kept_entries
from concertina.v1 import bundle_pb2 as pb
from export.graph_file import trace_graph
from export.graphs import TORCH_TYPES

TAKE, PUT = "take.onnx", "put.onnx"


class _TakeGraph(nn.Module):
    """Maps `rows[B]`, `tokens[B, m]`, all `entries[B, n]` and buffers `[S, …]` to parts `[B, …]`.

    A part has the given entries of a stack, the given tokens of a history, or a whole recurrent
    tensor.
    """

    def __init__(self, state: Sequence[pb.StateTensor]) -> None:
        super().__init__()
        self.kinds = [tensor.kind for tensor in state]
        lengths = stack_lengths(state)
        self.lengths = [lengths.index(kept_entries(tensor)) for tensor in state]

    def forward(
        self, rows: Tensor, tokens: Tensor, entries: list[Tensor], buffers: list[Tensor]
    ) -> list[Tensor]:
        """See the class."""
        return [
            buffer[_place(kind, buffer, rows, tokens, entries[length])]
            for kind, length, buffer in zip(self.kinds, self.lengths, buffers, strict=True)
        ]


class _PutGraph(_TakeGraph):
    """Maps the same inputs and such parts to the buffers with the parts in place."""

    def forward(  # type: ignore[override]
        self,
        rows: Tensor,
        tokens: Tensor,
        entries: list[Tensor],
        buffers: list[Tensor],
        parts: list[Tensor],
    ) -> list[Tensor]:
        """See the class."""
        return [
            buffer.index_put(_place(kind, buffer, rows, tokens, entries[length]), part)
            for kind, length, buffer, part in zip(
                self.kinds, self.lengths, buffers, parts, strict=True
            )
        ]


def stack_lengths(state: Sequence[pb.StateTensor]) -> list[int]:
    """What stacks keep of a folded block: as many different lengths do they have. First is 1."""
    return [1, *sorted({kept_entries(tensor) for tensor in state} - {1})]


def export_moves(state: Sequence[pb.StateTensor], folder: Path) -> list[str]:
    """Write both graphs for this `state` to `folder`, and return the file names."""
    slots, batch, tokens = Dim("slots"), Dim("batch"), Dim("tokens")
    lengths = stack_lengths(state)
    entries = [Dim(f"entries_{kept}") for kept in lengths]
    index_names = ["rows", "tokens", "entries", *(f"entries.{kept}" for kept in lengths[1:])]
    index_shapes = ({0: batch}, {0: batch, 1: tokens}, [{0: batch, 1: each} for each in entries])
    # The exporter treats equal sizes and size 1 as constants, so all example sizes differ.
    first = [torch.zeros(2, size, dtype=torch.int64) for size in (4, 3, 6, 7)]
    index = (torch.arange(2), first[0], first[1 : 1 + len(lengths)])
    buffers = [torch.zeros(5, *t.shape, dtype=TORCH_TYPES[t.data_type]) for t in state]
    names = [t.name for t in state]
    take = _TakeGraph(state)
    parts = take(*index, buffers)
    part_names = [f"part.{name}" for name in names]
    part_shapes: list[dict[int, object]] = [{0: batch} for _ in state]
    for tensor, shape in zip(state, part_shapes, strict=True):
        if tensor.kind == pb.STATE_KIND_STACK:
            shape[2] = entries[lengths.index(kept_entries(tensor))]
        elif tensor.kind == pb.STATE_KIND_HISTORY:
            shape[1] = tokens
    buffer_shapes = [{0: slots} for _ in state]
    proto, _ = trace_graph(
        take,
        (*index, buffers),
        (*index_shapes, buffer_shapes),
        [*index_names, *names],
        part_names,
    )
    onnx.save(proto, folder / TAKE)
    proto, _ = trace_graph(
        _PutGraph(state),
        (*index, buffers, parts),
        (*index_shapes, buffer_shapes, part_shapes),
        [*index_names, *names, *part_names],
        [f"next.{name}" for name in names],
    )
    onnx.save(proto, folder / PUT)
    return [TAKE, PUT]


def _place(
    kind: int, buffer: Tensor, rows: Tensor, tokens: Tensor, entries: Tensor
) -> tuple[Tensor, ...]:
    if kind == pb.STATE_KIND_STACK:
        heads = torch.arange(buffer.shape[1])
        return rows[:, None, None], heads[:, None], entries[:, None]
    if kind == pb.STATE_KIND_HISTORY:
        return rows[:, None], tokens
    return (rows,)
