"""The kernels used in serving, and how they get queries, keys and values as one product, or turned.

The exported graph does what the model does: it splits the product in thirds, reshapes them by head,
scales the queries, and flattens the thirds again. The kernel also accepts the whole product and can
scale by itself, which saves a copy and eight nodes in every layer's step. Where something is done
to queries and keys first, the kernel takes the three apart, without the reshapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from model.layers.positions import RotaryPositions, Turn

_NO_SINK = -1e30
_Setting = (
    int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]
)
_VIEWS = ("Reshape", "Transpose")
_FLAT = ("Split", "RotaryEmbedding")
"""Nodes whose outputs are `[B, T, heads * D]`, as the kernel takes them."""
_BEGIN, _AXIS = "packed.begin", "packed.axis"


class Kernel(Protocol):
    """Pushes T tokens onto the stacks of keys and values, then attends."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        longest: Tensor,
        units: Sequence[Tensor],
        *,
        window: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Push` and `StepGraph`; `units` are those of keys and of values, if there are any."""


class _Third(NamedTuple):
    """The output that an input of the kernel is a view of, and its scale."""

    split: onnx.NodeProto
    """The node; with `place`, which of its outputs it is."""
    place: int
    scale: float


def group_query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    longest: Tensor,
    units: Sequence[Tensor],
    *,
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel used in serving: writes k and v after the valid entries, in place, and attends.

    The operator takes the index of the last valid entry, counted from 0. It computes in the type of
    the stacks. With `units`, of keys and of values, the stacks are int8: it rounds k and v first,
    reads only what it rounded, and computes in float32. window: number of the newest entries to
    attend to; 0 means all.
    """
    batch, heads, time, dim = q.shape
    element = q.dtype if units else keys.dtype

    def flat(x: Tensor) -> Tensor:
        return x.to(element).transpose(1, 2).flatten(2)  # [B, T, H*D]

    inputs: list[Tensor | None] = [flat(q), flat(k), flat(v), keys, values, lengths - 1, longest]
    settings: dict[str, _Setting] = {
        "num_heads": heads,
        "kv_num_heads": k.shape[1],
        "scale": 1.0,
        **({"local_window_size": window} if window else {}),
    }
    if units:
        # A sink that takes nothing: without one, onnxruntime may share out one stream's entries
        # among threads, and then the number of threads and the company change the last bits.
        sink = torch.full((heads,), _NO_SINK)
        inputs += [None, None, None, None, sink, *units]
        settings |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        settings["kv_cache_bit_width"] = 8
    out, next_keys, next_values = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        settings,
        dtypes=(element, keys.dtype, values.dtype),
        shapes=((batch, time, heads * dim), keys.shape, values.shape),
        version=1,
    )
    out = out.to(q.dtype).view(batch, time, heads, dim).transpose(1, 2)
    return out, next_keys, next_values


def turn_in_kernel(rotary: RotaryPositions, positions: Tensor) -> Turn:
    """What turns queries and keys at `positions[B, T]` by a kernel of its own."""
    cosines, sines = rotary(positions)
    return partial(_rotary_embedding, cosines=cosines, sines=sines)


def _rotary_embedding(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """The kernel that turns `x[B, T, heads, D]` by angles `[B, T, pairs]`.

    It looks the angles up in tables: here they are those of this pass, in the order of its tokens,
    so that no table over the context is needed.
    """
    batch, time, heads, dim = x.shape
    pairs = cosines.shape[-1]
    rows = torch.arange(batch * time, device=x.device).view(batch, time)
    turned = torch.onnx.ops.symbolic(
        "com.microsoft::RotaryEmbedding",
        (x.flatten(2), rows, cosines.flatten(0, 1), sines.flatten(0, 1)),
        {"num_heads": heads, "rotary_embedding_dim": 2 * pairs if 2 * pairs < dim else 0},
        dtype=x.dtype,
        shape=(batch, time, heads * dim),
        version=1,
    )
    return turned.view(batch, time, heads, dim)


def pack_attention(proto: onnx.ModelProto) -> None:
    """Pass the whole product to every GroupQueryAttention whose q, k, v are thirds of it.

    This does not check that the reshapes cancel out; the parity check of the export does.
    """
    graph = proto.graph
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "GroupQueryAttention":
            continue
        thirds = [_trace(name, makers, constants) for name in node.input[:3]]
        if _are_thirds(thirds):
            assert thirds[0] is not None
            _multiply_scale(node, thirds[0].scale)
            node.input[:3] = [thirds[0].split.input[0], "", ""]
            continue
        for place, third in enumerate(thirds):
            if third is not None and (place == 0 or third.scale == 1.0):
                node.input[place] = third.split.output[third.place]
                _multiply_scale(node, third.scale)
    _drop_unread(graph)
    _slice_queries(graph, constants)


def free_entries(proto: onnx.ModelProto, stacks: set[str]) -> None:
    """Let the stacks have any number of entries. The kernel takes it from the buffer it gets."""
    for value in (*proto.graph.input, *proto.graph.output):
        if value.name.removeprefix("next.") in stacks:
            value.type.tensor_type.shape.dim[2].dim_param = "entries"


def _multiply_scale(node: onnx.NodeProto, factor: float) -> None:
    (scale,) = (a for a in node.attribute if a.name == "scale")
    scale.f *= factor


def _trace(
    name: str, makers: dict[str, onnx.NodeProto], constants: dict[str, onnx.TensorProto]
) -> _Third | None:
    scale = 1.0
    while (node := makers.get(name)) is not None:
        if node.op_type in _FLAT:
            return _Third(node, list(node.output).index(name), scale)
        if node.op_type == "Mul" and node.input[1] in constants:
            factor = constants[node.input[1]]
            if math.prod(factor.dims) != 1:
                return None
            scale *= numpy_helper.to_array(factor).item()
        elif node.op_type not in _VIEWS:
            return None
        name = node.input[0]
    return None


def _are_thirds(thirds: list[_Third | None]) -> bool:
    split = thirds[0].split if thirds[0] else None
    return all(
        third is not None
        and third.split is split
        and split.op_type == "Split"
        and len(third.split.output) == 3
        and third.place == place
        and (place == 0 or third.scale == 1.0)
        for place, third in enumerate(thirds)
    )


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Remove nodes whose outputs are not used any more."""
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if read & set(node.output):
            read.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _slice_queries(graph: onnx.GraphProto, constants: dict[str, onnx.TensorProto]) -> None:
    """Replace a Split of which only the queries are used by a Slice, which copies less."""
    read = {name for node in graph.node for name in node.input}
    known = {value.name: value for value in graph.value_info}
    for place, node in enumerate(graph.node):
        if node.op_type != "Split" or read & set(node.output[1:]):
            continue
        queries = node.output[0]
        width = known[queries].type.tensor_type.shape.dim[2].dim_value
        ends = {_BEGIN: 0, f"packed.end.{width}": width, _AXIS: 2}
        for name, number in ends.items():
            if name not in constants:
                constants[name] = numpy_helper.from_array(np.array([number]), name)
                graph.initializer.append(constants[name])
        graph.node[place].CopyFrom(
            helper.make_node("Slice", [node.input[0], *ends], [queries], node.name)
        )
