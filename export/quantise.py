"""Quantises the matrices of a step graph.

The large matrix products (projections, MLP, head) become `com.microsoft.MatMulNBits`. Other weights
are not changed: embeddings are only looked up, the patterns' own weights are small and may also be
in the fold graph, and norms and biases are not matrices. A head that is tied shares its integers
with the embeddings, which become `com.microsoft.GatherBlockQuantized`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from export.graph_file import Array, lies_beside, read_graph, write_graph
from export.packing import Packed, pack, unpack
from export.weights import INTEGERS, SCALES, find_initializers
from model.decoder import Block, Decoder
from model.initial import HALF

BLOCK = 128
"""Number of weights that share a scale. Smaller blocks lose a little less but are slower."""
PRETRAINED_BLOCK = 32
"""The same for pretrained models, whose matrices have rare large weights."""
_LOOKED_UP_BITS = 8  # of a matrix that is the head and the embeddings
_ROUNDED = 4  # with this accuracy_level, the kernel rounds its input to 8 bits


def pack_weights(model: Decoder, bits: int, block: int = BLOCK) -> dict[str, Packed]:
    """Quantised matrices of `model` (4 or 8 bits), by name. Also rounds those in `model` itself.

    block: number of weights that share a scale.
    """
    matrices = {"head.weight": model.head.weight}
    for layer, part in enumerate(model.blocks):
        assert isinstance(part, Block)
        for name in ("qkv", "out", "up", "down"):
            matrices[f"blocks.{layer}.{name}.weight"] = getattr(part, name).weight
    packed = {}
    tied = model.config.architecture.tied
    for name, matrix in matrices.items():
        enough = _LOOKED_UP_BITS if tied and matrix is model.head.weight else bits
        packed[name] = pack(matrix.detach().numpy(), enough, block)
        with torch.no_grad():
            matrix.copy_(torch.from_numpy(unpack(packed[name])))
    return packed


def quantise_step(path: Path, packed: Mapping[str, Packed]) -> None:
    """Replace the matrices in the step graph at `path` by those from `pack_weights`.

    The kernels still use exact activations, until `round_activations`.
    """
    proto = read_graph(path)
    graph = proto.graph
    initializers = find_initializers(proto)
    matrices = {initializers[name]: matrix for name, matrix in packed.items()}
    nodes = []
    for node in graph.node:
        if matrices.keys() & set(node.output):  # what widens a matrix of two bytes
            continue
        if node.op_type == "Gather" and node.input[0] in matrices:
            nodes += _look_up(graph, node, matrices[node.input[0]])
        elif len(node.input) > 1 and node.input[1] in matrices:
            nodes.append(_in_few_bits(node, matrices[node.input[1]]))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    replaced = matrices.keys() | {name + HALF for name in matrices}
    kept = [tensor for tensor in graph.initializer if tensor.name not in replaced]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    parts: dict[str, Array] = {}
    for name, matrix in matrices.items():
        parts |= {name + INTEGERS: matrix.integers, name + SCALES: matrix.scales}
    for name in parts:
        graph.initializer.add(name=name)
    write_graph(proto, path, parts, lies_beside(path))


def round_activations(path: Path) -> None:
    """Make the kernels of the quantised step graph at `path` round their input to 8 bits.

    This makes them fast. Each block of each token's input has its own scale, so a stream does not
    depend on the other streams of its batch.
    """
    proto = read_graph(path)
    for node in proto.graph.node:
        if node.op_type == "MatMulNBits":
            node.attribute.append(helper.make_attribute("accuracy_level", _ROUNDED))
    path.write_bytes(proto.SerializeToString())


def _in_few_bits(node: onnx.NodeProto, matrix: Packed) -> onnx.NodeProto:
    """The node that replaces a MatMul, or a Gemm with its bias."""
    name, rest = node.input[1], list(node.input[2:])
    return helper.make_node(
        "MatMulNBits",
        [node.input[0], name + INTEGERS, name + SCALES, *(["", "", *rest] if rest else [])],
        list(node.output),
        node.name,
        domain="com.microsoft",
        N=len(matrix.integers),
        K=matrix.columns,
        bits=matrix.bits,
        block_size=matrix.block,
    )


def _look_up(graph: onnx.GraphProto, node: onnx.NodeProto, matrix: Packed) -> list[onnx.NodeProto]:
    """The nodes that replace the Gather of rows of a matrix, whose product is taken, too.

    The product wants its integers as `[N, blocks, b]`, so that is what rows are looked up in.
    """
    name, (out,) = node.input[0], node.output
    sizes = {"axis": [2], "begin": [0], "row": [0, 0, -1], "end": [matrix.columns]}
    constants = {part: f"{name}.{part}" for part in sizes}
    for part, numbers in sizes.items():
        graph.initializer.append(numpy_helper.from_array(np.array(numbers), constants[part]))
    scales, blocks, row = f"{name}.scale_of_block", f"{out}.blocks", f"{out}.row"
    return [
        helper.make_node("Unsqueeze", [name + SCALES, constants["axis"]], [scales]),
        helper.make_node(
            "GatherBlockQuantized",
            [name + INTEGERS, node.input[1], scales],
            [blocks],
            node.name,
            domain="com.microsoft",
            bits=matrix.bits,
            block_size=matrix.block,
            gather_axis=0,
            quantize_axis=2,
        ),
        helper.make_node("Reshape", [blocks, constants["row"]], [row]),
        helper.make_node(
            "Slice", [row, constants["begin"], constants["end"], constants["axis"]], [out]
        ),
    ]
