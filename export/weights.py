"""The weights inside a graph: which parameter each is, and how to read them back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper

from export.graph_file import Matrices
from export.packing import Packed, unpack
from model.decoder import Decoder
from model.initial import CONFIG_PROP, WEIGHTS_PROP, decoder_in

INTEGERS, SCALES = ".integers", ".scales"
"""Suffixes of the names of the two parts of a packed matrix."""


def name_weights(proto: onnx.ModelProto, matrices: Matrices, model: Decoder) -> None:
    """Record the model's config in a graph, and which initializer holds each parameter.

    matrices: the content of the initializers that have none.
    """
    onnx.helper.set_model_props(
        proto,
        {
            CONFIG_PROP: json.dumps(model.config.stored()),
            WEIGHTS_PROP: json.dumps(_find_weights(proto, matrices, model)),
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


def _find_weights(
    proto: onnx.ModelProto, matrices: Matrices, model: Decoder
) -> dict[str, tuple[str, bool]]:
    """The initializer that holds each parameter, and whether transposed; the exporter may do so."""
    found = {}
    for tensor in proto.graph.initializer:
        values = matrices.get(tensor.name)
        content = numpy_helper.to_array(tensor) if values is None else values
        found[_fingerprint(content)] = tensor.name
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
