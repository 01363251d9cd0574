"""A trained decoder as two ONNX graphs: one for steps, one for folds.

Shapes: `B` streams, `T` new tokens, `H` heads, `E` entries of a stack, `D` head_dim. State tensors
are named `<name>.<layer>`. Graph inputs are in the manifest's order; unused ones are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from concertina.v1 import bundle_pb2 as pb
from export.graph_file import trace_graph, write_graph
from export.kernel import (
    Kernel,
    free_entries,
    group_query_attention,
    pack_attention,
    turn_in_kernel,
)
from export.weights import name_weights
from model.attention import widen
from model.decoder import Block, Decoder
from model.layers.architecture import OURS
from model.layers.positions import Turn
from model.patterns.pattern import Pattern, Place, StateTensor

TORCH_TYPES = {
    pb.DATA_TYPE_FLOAT32: torch.float32,
    pb.DATA_TYPE_FLOAT16: torch.float16,
    pb.DATA_TYPE_INT8: torch.int8,
}
Units = Mapping[str, Tensor]
"""What 1 means in a cache of integers, `[H, 1, D]`, by the name of the state tensor."""
LARGEST = 127
"""Largest integer of a cache; the smallest is -128."""
CACHES = ("keys", "values")
"""Names of the stacks that the kernel reads."""
_KINDS = {
    "stack": pb.STATE_KIND_STACK,
    "history": pb.STATE_KIND_HISTORY,
    "recurrent": pb.STATE_KIND_RECURRENT,
}


def layers(model: Decoder) -> list[Pattern]:
    """The pattern of each layer."""
    return [block.pattern for block in model.blocks if isinstance(block, Block)]


def state_tensors(
    model: Decoder, data_type: pb.DataType = pb.DATA_TYPE_FLOAT32
) -> list[pb.StateTensor]:
    """The state of one stream, in the order of the graph inputs.

    Stacks and histories have type `data_type`. Recurrent tensors are always float32: every step
    changes them, and sums would lose precision. int8 is only for what the kernel reads, keys and
    values of stacks. Raises ValueError for a pattern that cannot decode, or not in int8.
    """
    if data_type == pb.DATA_TYPE_INT8:
        _check_stacks(model)
    return [
        pb.StateTensor(
            name=f"{tensor.name}.{layer}",
            kind=_KINDS[tensor.kind],
            shape=tensor.shape,
            data_type=_type_of(tensor, data_type),
            initial=tensor.initial,
        )
        for layer, pattern in enumerate(layers(model))
        for tensor in pattern.state()
    ]


def _type_of(tensor: StateTensor, wanted: pb.DataType) -> pb.DataType:
    if tensor.kind == "recurrent":
        return pb.DATA_TYPE_FLOAT32
    if wanted == pb.DATA_TYPE_INT8 and tensor.name not in CACHES:
        return pb.DATA_TYPE_FLOAT32
    return wanted


def _check_stacks(model: Decoder) -> None:
    kinds = {tensor.kind for pattern in layers(model) for tensor in pattern.state()}
    if "history" in kinds or "stack" not in kinds:
        raise ValueError(
            f"the pattern {model.config.attention} cannot keep its state in int8: the attention "
            "kernel reads int8 from stacks only, and the pattern reads "
            f"{' and '.join(sorted(kinds))} tensors; use --state float32 or float16"
        )


class StepGraph(nn.Module):
    """Pushes T more tokens for each stream, and computes logits for some of them.

    Inputs: `tokens[B, T]`, `positions[B, T]`, `lengths[B]` (valid entries of every stack after the
    push, int32), `longest` (an upper bound of `lengths`, int32 scalar, in host memory), `rows[R]`
    (indices of those of the B*T tokens that need logits), then the state. Outputs:
    `logits[R, vocabulary]`, then the changed state. With stacks, B > 1 and T > 1 together need
    empty stacks. The T tokens must not cross a point where a fold is due.

    kernel: pushes and attends. units: of caches in int8.
    """

    def __init__(
        self,
        model: Decoder,
        kernel: Kernel = group_query_attention,
        units: Units | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.kernel = kernel
        self.units = units or {}
        self.changed: list[str] = []
        """Names of the state tensors that the last pass returned."""

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        lengths: Tensor,
        longest: Tensor,
        rows: Tensor,
        state: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """See the class."""
        remaining = iter(state)

        following: dict[str, Tensor] = {}
        x = self.model.embed_at(tokens, positions)
        turn = self._turn_at(positions)
        for layer, block in enumerate(self.model.blocks):
            assert isinstance(block, Block)

            def attend(
                pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, x: Tensor, layer: int = layer
            ) -> Tensor:
                units = [self.units[f"{name}.{layer}"] for name in CACHES if self.units]
                push = partial(self.kernel, lengths=lengths, longest=longest, units=units)
                place = Place(positions, lengths, push)
                given = {t.name: next(remaining) for t in pattern.state()}
                out, changed = pattern.step(q, k, v, x, place, given)
                following.update({f"{name}.{layer}": changed[name] for name in changed})
                return out

            mixed = block.mix(x, attend, turn)
            if block is self.model.blocks[-1]:
                # From here on only tokens that need logits matter, as the state is complete. So a
                # prefill pass, which needs no logits, skips most of the last layer.
                x, mixed = x.flatten(0, 1)[rows], mixed.flatten(0, 1)[rows]
            x = block.add(x, mixed)
        self.changed = list(following)
        return self.model.head(self.model.norm(x)), list(following.values())

    def _turn_at(self, positions: Tensor) -> Turn | None:
        if (rotary := self.model.rotary) is None:
            return None
        in_kernel = self.kernel is group_query_attention
        return turn_in_kernel(rotary, positions) if in_kernel else rotary.turn_at(positions)


class FoldGraph(nn.Module):
    """Folds the state of every layer, as `Pattern.fold` describes.

    Computes in float32 at least; `units`, of caches in int8, turn them into numbers and back.
    """

    def __init__(self, model: Decoder, units: Units | None = None) -> None:
        super().__init__()
        self.patterns = nn.ModuleList(layers(model))
        self.units = units or {}
        self.changed: list[str] = []
        """Names of the state tensors that the last pass returned."""

    def forward(self, state: list[Tensor]) -> list[Tensor]:
        """See the class."""
        remaining = iter(state)
        following: dict[str, Tensor] = {}
        for layer, pattern in enumerate(self.patterns):
            assert isinstance(pattern, Pattern)
            given = {t.name: next(remaining) for t in pattern.state()}
            wide = {name: widen(part) for name, part in given.items()}
            units = {
                name: u for name in given if (u := self.units.get(f"{name}.{layer}")) is not None
            }
            changed = pattern.fold(wide | {name: wide[name] * unit for name, unit in units.items()})
            for name, part in changed.items():
                if name in units:
                    part = (part / units[name]).round().clamp(-LARGEST - 1, LARGEST)
                following[f"{name}.{layer}"] = part.to(given[name].dtype)
        self.changed = list(following)
        return list(following.values())


def step_example(
    model: Decoder, batch: int = 2, time: int = 3, data_type: pb.DataType = pb.DATA_TYPE_FLOAT32
) -> tuple[object, ...]:
    """Example inputs of the step graph, for new streams."""
    state = [
        _filled((batch, *t.shape), t.initial, TORCH_TYPES[t.data_type])
        for t in state_tensors(model, data_type)
    ]
    return (
        torch.zeros(batch, time, dtype=torch.int64),
        torch.arange(time).expand(batch, time).contiguous(),
        torch.full((batch,), time, dtype=torch.int32),
        torch.tensor(time, dtype=torch.int32),
        torch.arange(batch * time - 1),
        state,
    )


def _filled(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
    """A tensor of one value. Zeros take no memory before they are written to."""
    return torch.full(shape, value, dtype=dtype) if value else torch.zeros(shape, dtype=dtype)


def fold_example(
    model: Decoder,
    entries: int,
    rows: int,
    batch: int = 2,
    data_type: pb.DataType = pb.DATA_TYPE_FLOAT32,
) -> list[Tensor]:
    """Example inputs of the fold graph: `entries` of each stack, `rows` of each history."""
    example = []
    for tensor in state_tensors(model, data_type):
        shape = list(tensor.shape)
        if tensor.kind == pb.STATE_KIND_STACK:
            shape[1] = entries
        elif tensor.kind == pb.STATE_KIND_HISTORY:
            shape[0] = rows
        example.append(torch.zeros(batch, *shape, dtype=TORCH_TYPES[tensor.data_type]))
    return example


def export_step(
    model: Decoder,
    path: Path,
    data_type: pb.DataType = pb.DATA_TYPE_FLOAT32,
    units: Units | None = None,
    *,
    beside: bool = False,
) -> None:
    """Write the step graph of `model` to `path`, with its weights in two bytes where they fit.

    data_type: type of the state, see `state_tensors`; int8 needs `units`. beside: puts the weights
    into a file of their own. The stacks of an architecture that is not ours may have fewer entries
    than the context.
    """
    graph = StepGraph(model, units=units)
    # The exporter treats equal sizes and size 1 as constants, so all example sizes differ.
    inputs = step_example(model, data_type=data_type)
    names = [t.name for t in state_tensors(model)]
    batch, time, chosen = Dim("batch"), Dim("time"), Dim("chosen")
    shapes = (
        {0: batch, 1: time},
        {0: batch, 1: time},
        {0: batch},
        None,
        {0: chosen},
        [{0: batch} for _ in names],
    )
    graph(*inputs)
    inputs_named = ["tokens", "positions", "lengths", "longest", "rows", *names]
    outputs = ["logits", *(f"next.{name}" for name in graph.changed)]
    proto, matrices = trace_graph(graph, inputs, shapes, inputs_named, outputs)
    pack_attention(proto)
    if model.config.architecture != OURS:
        free_entries(proto, {name for name in names if name.split(".")[0] in CACHES})
    name_weights(proto, matrices, model)
    write_graph(proto, path, matrices, beside)


def export_fold(
    model: Decoder,
    path: Path,
    data_type: pb.DataType = pb.DATA_TYPE_FLOAT32,
    units: Units | None = None,
) -> None:
    """Write the fold graph of `model` to `path`. The pattern must have a fold."""
    graph = FoldGraph(model, units)
    schedule = layers(model)[0].schedule
    assert schedule is not None
    sizes = (3, 4) if schedule.binary else (schedule.span, schedule.span)
    state, batch = state_tensors(model), Dim("batch")
    example = fold_example(model, *sizes, data_type=data_type)
    shapes: list[dict[int, object]] = [{0: batch} for _ in state]
    if schedule.binary:
        entries, rows = Dim("entries", min=2), Dim("rows", min=2)
        for tensor, shape in zip(state, shapes, strict=True):
            if tensor.kind == pb.STATE_KIND_STACK:
                shape[2] = entries
            elif tensor.kind == pb.STATE_KIND_HISTORY:
                shape[1] = rows
    graph(example)
    outputs = [f"next.{name}" for name in graph.changed]
    proto, matrices = trace_graph(graph, (example,), (shapes,), [t.name for t in state], outputs)
    name_weights(proto, matrices, model)
    write_graph(proto, path, matrices)
