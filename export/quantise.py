"""Quantises the matrices of a step graph.

The large matrix products (projections, MLP, head) become `com.microsoft.MatMulNBits`. Other weights
are not changed: embeddings are only looked up, the patterns' own weights are small and may also be
in the fold graph, and norms and biases are not matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from onnx import helper

from export.graph_file import Array, lies_beside, read_graph, write_graph
from export.packing import Packed, pack, unpack
from export.weights import INTEGERS, SCALES, find_initializers
from model.decoder import Block, Decoder
from model.initial import HALF

BLOCK = 128
"""Number of weights that share a scale. Smaller blocks lose a little less but are slower."""
_ROUNDED = 4  # with this accuracy_level, the kernel rounds its input to 8 bits


def pack_weights(model: Decoder, bits: int) -> dict[str, Packed]:
    """Quantised matrices of `model` (4 or 8 bits), by name. Also rounds those in `model` itself."""
    # A tied head is looked up in, too.
    matrices = {} if model.config.architecture.tied else {"head.weight": model.head.weight}
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        for name in ("qkv", "out", "up", "down"):
            matrices[f"blocks.{layer}.{name}.weight"] = getattr(block, name).weight
    packed = {}
    for name, matrix in matrices.items():
        packed[name] = pack(matrix.detach().numpy(), bits, BLOCK)
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
        matrix = matrices.get(node.input[1]) if len(node.input) > 1 else None
        if not matrices.keys() & set(node.output):  # what widens a matrix of two bytes
            nodes.append(_in_few_bits(node, matrix) if matrix else node)
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
