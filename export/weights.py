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
from model.decoder import Decoder
from model.initial import CONFIG_PROP, HALF, WEIGHTS_PROP, decoder_in

INTEGERS, SCALES = ".integers", ".scales"
"""Suffixes of the names of the two parts of a packed matrix."""


def name_weights(proto: onnx.ModelProto, model: Decoder) -> None:
    """Record the model's config in a graph, and which initializer holds each parameter."""
    onnx.helper.set_model_props(
        proto,
        {
            CONFIG_PROP: json.dumps(model.config.stored()),
            WEIGHTS_PROP: json.dumps(_find_weights(proto, model)),
        },
    )


def load_decoder(folder: Path) -> Decoder:
    """The decoder in the bundle `folder`, with the weights that are served.

    So a bundle can be checked, or trained further, without its checkpoint. Raises ValueError if
    Concertina did not export the graphs.
    """
    model = decoder_in(folder, _unpack)
    if model is None:
        raise ValueError(f"{folder} was not exported by Concertina: no graph has {CONFIG_PROP}")
    return model


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
        initializer.CopyFrom(numpy_helper.from_array(half, name + HALF))
        casts.append(
            onnx.helper.make_node("Cast", [name + HALF], [name], to=onnx.TensorProto.FLOAT)
        )
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def stored_bytes(model: Decoder) -> int:
    """Bytes of the weights of `model` in a graph, as `store_half` stores them."""
    matrices = (p.detach().numpy() for p in model.parameters() if p.ndim >= 2)
    vectors = sum(4 * p.numel() for p in model.parameters() if p.ndim < 2)
    return vectors + sum((4 if _in_two_bytes(m) is None else 2) * m.size for m in matrices)


def _in_two_bytes(values: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    for kind in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
        with np.errstate(over="ignore"):
            half = values.astype(kind)
        if np.array_equal(half.astype(np.float32), values):
            return half
    return None


def find_initializers(model: onnx.ModelProto) -> dict[str, str]:
    """Names of the initializers, by the name of the parameter that each holds."""
    props = {prop.key: prop.value for prop in model.metadata_props}
    return {name: holder for name, (holder, _) in json.loads(props[WEIGHTS_PROP]).items()}


def _unpack(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """Packed matrices as float32, by the name of the initializer that they replaced."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    matrices = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            integers, scales = (numpy_helper.to_array(stored[name]) for name in node.input[1:3])
            packed = Packed(integers, scales, settings["bits"], settings["K"])
            matrices[node.input[1].removesuffix(INTEGERS)] = torch.from_numpy(unpack(packed))
    return matrices


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
