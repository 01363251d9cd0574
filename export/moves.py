"""Two graphs that move state inside the memory of a device, which NumPy cannot access.

`take.onnx` copies parts of some rows out of the buffers; `put.onnx` writes such parts into rows, in
place. They need no weights, only the shapes of the state.

Shapes: buffers have `S` rows, of which `B` are read or written; a part has `n` entries of each
stack and `m` rows of each history.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from concertina.v1 import bundle_pb2 as pb
from export.graph_file import trace_graph
from export.graphs import TORCH_TYPES

TAKE, PUT = "take.onnx", "put.onnx"


class _TakeGraph(nn.Module):
    """Maps `rows[B]`, `entries[B, n]`, `tokens[B, m]` and buffers `[S, …]` to parts `[B, …]`.

    A part has the given entries of a stack, the given tokens of a history, or a whole recurrent
    tensor.
    """

    def __init__(self, state: Sequence[pb.StateTensor]) -> None:
        super().__init__()
        self.kinds = [tensor.kind for tensor in state]

    def forward(
        self, rows: Tensor, entries: Tensor, tokens: Tensor, buffers: list[Tensor]
    ) -> list[Tensor]:
        """See the class."""
        return [
            buffer[_place(kind, buffer, rows, entries, tokens)]
            for kind, buffer in zip(self.kinds, buffers, strict=True)
        ]


class _PutGraph(_TakeGraph):
    """Maps the same inputs and such parts to the buffers with the parts in place."""

    def forward(  # type: ignore[override]
        self,
        rows: Tensor,
        entries: Tensor,
        tokens: Tensor,
        buffers: list[Tensor],
        parts: list[Tensor],
    ) -> list[Tensor]:
        """See the class."""
        return [
            buffer.index_put(_place(kind, buffer, rows, entries, tokens), part)
            for kind, buffer, part in zip(self.kinds, buffers, parts, strict=True)
        ]


def export_moves(state: Sequence[pb.StateTensor], folder: Path) -> list[str]:
    """Write both graphs for this `state` to `folder`, and return the file names."""
    slots, batch, entries, tokens = Dim("slots"), Dim("batch"), Dim("entries"), Dim("tokens")
    index_names = ["rows", "entries", "tokens"]
    index_shapes = [{0: batch}, {0: batch, 1: entries}, {0: batch, 1: tokens}]
    # The exporter treats equal sizes and size 1 as constants, so all example sizes differ.
    index = [torch.arange(2), torch.arange(6).view(2, 3), torch.arange(8).view(2, 4)]
    buffers = [torch.zeros(5, *t.shape, dtype=TORCH_TYPES[t.data_type]) for t in state]
    names = [t.name for t in state]
    take = _TakeGraph(state)
    parts = take(*index, buffers)
    part_names = [f"part.{name}" for name in names]
    part_shapes: list[dict[int, object]] = [{0: batch} for _ in state]
    for tensor, shape in zip(state, part_shapes, strict=True):
        if tensor.kind == pb.STATE_KIND_STACK:
            shape[2] = entries
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
    kind: int, buffer: Tensor, rows: Tensor, entries: Tensor, tokens: Tensor
) -> tuple[Tensor, ...]:
    if kind == pb.STATE_KIND_STACK:
        heads = torch.arange(buffer.shape[1])
        return rows[:, None, None], heads[:, None], entries[:, None]
    if kind == pb.STATE_KIND_HISTORY:
        return rows[:, None], tokens
    return (rows,)
