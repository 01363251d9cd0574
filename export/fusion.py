"""Passes queries, keys and values to the attention kernel as one matrix product, or turned.

The exported graph does what the model does: it splits the product in thirds, reshapes them by head,
scales the queries, and flattens the thirds again. The kernel also accepts the whole product and can
scale by itself, which saves a copy and eight nodes in every layer's step. Where something is done
to queries and keys first, the kernel takes the three apart, without the reshapes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

_VIEWS = ("Reshape", "Transpose")
_FLAT = ("Split", "RotaryEmbedding")
"""Nodes whose outputs are `[B, T, heads * D]`, as the kernel takes them."""
_BEGIN, _AXIS = "packed.begin", "packed.axis"


class _Third(NamedTuple):
    """The output that an input of the kernel is a view of, and its scale."""

    split: onnx.NodeProto
    """The node; with `place`, which of its outputs it is."""
    place: int
    scale: float


def rotary_embedding(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
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
            factor = numpy_helper.to_array(constants[node.input[1]])
            if factor.size != 1:
                return None
            scale *= factor.item()
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
