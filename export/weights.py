"""The weights inside a graph: stores them as float16 or quantised, and reads them back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper

from export.packing import Packed, unpack
from model.config import ModelConfig
from model.decoder import Decoder

INTEGERS, SCALES = ".integers", ".scales"
"""Suffixes of the names of the two parts of a packed matrix."""
_HALF = ".half"
_CONFIG_PROP = "concertina.model_config"
_WEIGHTS_PROP = "concertina.weights"


def name_weights(proto: onnx.ModelProto, model: Decoder) -> None:
    """Record the model's config in a graph, and which initializer holds each parameter."""
    onnx.helper.set_model_props(
        proto,
        {
            _CONFIG_PROP: json.dumps(model.config.stored()),
            _WEIGHTS_PROP: json.dumps(_find_weights(proto, model)),
        },
    )


def load_decoder(folder: Path) -> Decoder:
    """The decoder in the bundle `folder`, with the weights that are served.

    So a bundle can be checked, or trained further, without its checkpoint. Raises ValueError if
    Concertina did not export the graphs.
    """
    config, weights = None, {}
    for path in sorted(folder.glob("*.onnx")):
        proto = onnx.load(path)
        props = {prop.key: json.loads(prop.value) for prop in proto.metadata_props}
        if _CONFIG_PROP not in props:
            continue
        config = ModelConfig.read(props[_CONFIG_PROP])
        restore_float(proto)
        stored = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
        packed = _find_packed(proto)
        for name, (initializer, transposed) in props[_WEIGHTS_PROP].items():
            if initializer in packed:  # in PyTorch's layout
                weights[name] = torch.from_numpy(unpack(packed[initializer]))
            else:
                values = torch.tensor(stored[initializer])
                weights[name] = values.T if transposed else values
    if config is None:
        raise ValueError(f"{folder} was not exported by Concertina: no graph has {_CONFIG_PROP}")
    model = Decoder(config)
    model.load_state_dict(weights)
    return model.eval()


def round_weights(model: Decoder) -> None:
    """Round the matrices of `model` to float16 in place: the weights that are stored and served."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(parameter.half().float())


def store_half(model: onnx.ModelProto) -> None:
    """Store matrices in two bytes a weight if that loses nothing, followed by a cast.

    The runtime casts once, at load. A matrix that was rounded is float16; a pretrained one may be
    bfloat16, or stays float32.
    """
    graph = model.graph
    casts = []
    for initializer in graph.initializer:
        if initializer.data_type != onnx.TensorProto.FLOAT or len(initializer.dims) < 2:
            continue
        name, values = initializer.name, numpy_helper.to_array(initializer)
        half = _in_two_bytes(values)
        if half is None:
            continue
        initializer.CopyFrom(numpy_helper.from_array(half, name + _HALF))
        casts.append(
            onnx.helper.make_node("Cast", [name + _HALF], [name], to=onnx.TensorProto.FLOAT)
        )
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _in_two_bytes(values: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    for kind in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
        with np.errstate(over="ignore"):
            half = values.astype(kind)
        if np.array_equal(half.astype(np.float32), values):
            return half
    return None


def restore_float(model: onnx.ModelProto) -> None:
    """Undo `store_half`."""
    graph = model.graph
    halves = {tensor.name: tensor for tensor in graph.initializer if tensor.name.endswith(_HALF)}
    for tensor in halves.values():
        values = numpy_helper.to_array(tensor).astype("float32")
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name.removesuffix(_HALF)))
    nodes = [node for node in graph.node if not (node.input and node.input[0] in halves)]
    del graph.node[:]
    graph.node.extend(nodes)


def find_initializers(model: onnx.ModelProto) -> dict[str, str]:
    """Names of the initializers, by the name of the parameter that each holds."""
    props = {prop.key: prop.value for prop in model.metadata_props}
    return {name: holder for name, (holder, _) in json.loads(props[_WEIGHTS_PROP]).items()}


def _find_packed(model: onnx.ModelProto) -> dict[str, Packed]:
    """Packed matrices, by the name of the initializer that they replaced."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    packed = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            integers, scales = (numpy_helper.to_array(stored[name]) for name in node.input[1:3])
            packed[node.input[1].removesuffix(INTEGERS)] = Packed(
                integers, scales, settings["bits"], settings["K"]
            )
    return packed


def _find_weights(proto: onnx.ModelProto, model: Decoder) -> dict[str, tuple[str, bool]]:
    """The initializer that holds each parameter, and whether transposed; the exporter may do so."""
    found = {}
    for initializer in proto.graph.initializer:
        found[_fingerprint(numpy_helper.to_array(initializer))] = initializer.name
    weights = {}
    for name, parameter in model.state_dict().items():
        values = parameter.numpy()
        plain = found.get(_fingerprint(values))
        holder = plain or found.get(_fingerprint(values.T))
        if holder is not None:
            weights[name] = (holder, plain is None)
    return weights


def _fingerprint(values: npt.NDArray[Any]) -> tuple[tuple[int, ...], bytes]:
    content = np.ascontiguousarray(values)
    return values.shape, hashlib.sha256(content.view(np.uint8).data).digest()
