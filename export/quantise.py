"""A step graph whose matrices are stored in few bits.

The matrices that every token is multiplied by (projections, MLP, head) become
`com.microsoft.MatMulNBits`. Embeddings are only looked up and patterns' own weights are small and
may lie in the fold graph, too: they, norms and biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from onnx import helper, numpy_helper

from export.packing import Packed, pack, unpack
from export.weights import INTEGERS, SCALES, find_initializers, restore_float, store_half
from model.decoder import Block, Decoder

BLOCK = 128
"""Weights that share a scale. Smaller blocks lose a little less, and are slower."""
_ROUNDED = 4  # the accuracy_level at which the kernel rounds its input to 8 bits


def pack_weights(model: Decoder, bits: int) -> dict[str, Packed]:
    """The matrices of `model` in `bits` (4 or 8) bits, by name; rounded alike in `model` itself."""
    matrices = {"head.weight": model.head.weight}
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
    """Put what `pack_weights` gave in the place of those matrices in the step graph at `path`.

    Its kernels still take activations as they are, until `round_activations`.
    """
    proto = onnx.load(path)
    restore_float(proto)
    graph = proto.graph
    initializers = find_initializers(proto)
    matrices = {initializers[name]: matrix for name, matrix in packed.items()}
    nodes = []
    for node in graph.node:
        matrix = matrices.get(node.input[1]) if len(node.input) > 1 else None
        nodes.append(_in_few_bits(node, matrix) if matrix else node)
    del graph.node[:]
    graph.node.extend(nodes)
    kept = [tensor for tensor in graph.initializer if tensor.name not in matrices]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for name, matrix in matrices.items():
        graph.initializer.append(numpy_helper.from_array(matrix.integers, name + INTEGERS))
        graph.initializer.append(numpy_helper.from_array(matrix.scales, name + SCALES))
    store_half(proto)
    onnx.save(proto, path)


def round_activations(path: Path) -> None:
    """Let the kernels of the quantised step graph at `path` round their input to 8 bits, too.

    That is what makes them fast. Every block of every token's input gets a scale of its own, so a
    stream stays independent of the others in its batch.
    """
    proto = onnx.load(path)
    for node in proto.graph.node:
        if node.op_type == "MatMulNBits":
            node.attribute.append(helper.make_attribute("accuracy_level", _ROUNDED))
    onnx.save(proto, path)


def _in_few_bits(node: onnx.NodeProto, matrix: Packed) -> onnx.NodeProto:
    """What takes the place of a MatMul, or of a Gemm with its bias."""
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
