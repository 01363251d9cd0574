"""Graphs, traced and on disk: matrices in the fewest bytes, in the graph's file or beside it.

A file of ONNX is a protobuf message, which holds at most 2 GiB. What is beside it is mapped into
memory by onnxruntime, and here a piece is written at a time.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper
from torch import nn

from concertina.v1 import bundle_pb2 as pb
from model.decoder import Decoder
from model.initial import HALF

LARGEST_GRAPH = (1 << 31) - (1 << 24)
"""Most bytes of weights in the file of a graph, beside its nodes."""
DATA = ".data"
"""Ends the name of the file that has the weights of the graph it is named after."""

_OPSET = 18
_PAGE = 1 << 12  # where a tensor begins, so that it can be mapped
_LEAST = 1 << 9  # what is smaller stays in the graph, where shapes are inferred from it
_PIECE = 1 << 24  # numbers at a time
_TYPES: dict[np.dtype[Any], pb.DataType] = {
    np.dtype(np.float16): pb.DATA_TYPE_FLOAT16,
    np.dtype(ml_dtypes.bfloat16): pb.DATA_TYPE_BFLOAT16,
    np.dtype(np.float32): pb.DATA_TYPE_FLOAT32,
}
"""From narrow to wide."""

Array = npt.NDArray[Any]
Matrices = Mapping[str, Array]
"""What initializers hold that have no content in the graph, by name."""


class Traced(NamedTuple):
    """A graph, and the content of those of its initializers that are matrices of floats.

    Most of that content is the very memory of the model.
    """

    proto: onnx.ModelProto
    matrices: Matrices


def trace_graph(
    graph: nn.Module, inputs: tuple[object, ...], shapes: object, names: list[str], out: list[str]
) -> Traced:
    """`graph` as ONNX, with names for inputs and outputs; unused inputs are left out.

    shapes: the dynamic dimensions of the example `inputs`, in the form that torch.export takes.
    """
    graph.eval()
    # The first warns of torchvision's operators, which no model here has; the second of matrices
    # that are taken out of the graph.
    for name in ("torch.onnx._internal.exporter._registration", "onnx_ir.serde"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            inputs,
            input_names=names,
            output_names=out,
            dynamic_shapes=shapes,  # type: ignore[arg-type]
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    matrices: dict[str, Array] = {}
    for name, initializer in program.model.graph.initializers.items():
        content = initializer.const_value
        assert content is not None
        if int(content.dtype) == onnx.TensorProto.FLOAT and len(content.shape) > 1 < content.size:
            matrices[name] = content.numpy()
            initializer.const_value = None
    proto = program.model_proto
    for name, values in matrices.items():
        proto.graph.initializer.add(name=name, dims=values.shape, data_type=onnx.TensorProto.FLOAT)
    for node in proto.graph.node:
        del node.metadata_props[:]  # stack traces, which contain paths of this machine
    read = {name for node in proto.graph.node for name in node.input}
    unread = [value for value in proto.graph.input if value.name not in read]
    for value in unread:
        proto.graph.input.remove(value)
    return Traced(proto, matrices)


def read_graph(path: Path) -> onnx.ModelProto:
    """The graph at `path`; what lies beside it stays there, see `write_graph`."""
    return onnx.load(path, load_external_data=False)


def lies_beside(path: Path) -> bool:
    """Whether the graph at `path` has weights beside it."""
    return _data(path).exists()


def write_graph(
    proto: onnx.ModelProto, path: Path, matrices: Matrices, beside: bool = False
) -> None:
    """Write a graph, with `matrices` as the content of the initializers of these names.

    What `read_graph` left beside `path` is kept as far as `proto` still has it. Floats are stored
    in two bytes if that loses nothing, and followed by a cast, which the runtime does once, at
    load. A matrix that was rounded is float16; a pretrained one may be bfloat16, or stays float32.
    """
    graph, casts = proto.graph, []
    data, partial = _data(path), _data(path).with_suffix(".partial")
    with partial.open("wb") as file:
        for tensor in graph.initializer:
            values, name = matrices.get(tensor.name), tensor.name
            if values is None:
                if tensor.data_location != TensorProto.EXTERNAL:
                    continue
                values, element = _mapped(tensor, data), None
            else:
                element = _smallest(values)
                if element != values.dtype:
                    name += HALF
                    casts.append(
                        helper.make_node("Cast", [name], [tensor.name], to=TensorProto.FLOAT)
                    )
                described = TensorProto(
                    name=name,
                    dims=values.shape,
                    data_type=helper.np_dtype_to_tensor_dtype(element),
                )
                tensor.CopyFrom(described)
            size = values.size * (element or values.dtype).itemsize
            if beside and size >= _LEAST:
                _point(tensor, data.name, _append(file, values, element), size)
            else:
                tensor.raw_data = b"".join(_pieces(values, element))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    path.write_bytes(proto.SerializeToString())
    if partial.stat().st_size:
        os.replace(partial, data)
    else:
        partial.unlink()
        data.unlink(missing_ok=True)


class Stored(NamedTuple):
    """How `write_graph` stores the weights of a model."""

    bytes: int
    widest: pb.DataType
    """Of the types of the matrices."""


def stored(model: Decoder) -> Stored:
    """How the weights of `model` are stored."""
    size, types = 0, {np.dtype(np.float16)}
    for parameter in model.parameters():
        if parameter.ndim < 2:
            size += 4 * parameter.numel()
            continue
        element = _smallest(parameter.detach().numpy())
        size += element.itemsize * parameter.numel()
        types.add(element)
    return Stored(size, next(kind for element, kind in [*_TYPES.items()][::-1] if element in types))


def _data(path: Path) -> Path:
    return path.with_name(path.name + DATA)


def _smallest(values: Array) -> np.dtype[Any]:
    """The smallest type that holds these values."""
    if values.dtype != np.float32:
        return values.dtype
    for element in _TYPES:
        with np.errstate(over="ignore"):
            if all(np.array_equal(v.astype(element).astype(v.dtype), v) for v in _parts(values)):
                return element
    return values.dtype


def _mapped(tensor: TensorProto, data: Path) -> Array:
    """The content of a tensor that lies beside the graph, as bytes."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    length = int(place["length"])
    return np.memmap(data, np.uint8, "r", int(place["offset"]), (length,))


def _point(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Say in `tensor` where its content is."""
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _append(file: BinaryIO, values: Array, element: np.dtype[Any] | None) -> int:
    """Write values to the end of a file; returns where they begin."""
    file.write(bytes(-file.tell() % _PAGE))
    begin = file.tell()
    for piece in _pieces(values, element):
        file.write(piece)
    return begin


def _pieces(values: Array, element: np.dtype[Any] | None) -> Iterator[memoryview]:
    """The bytes of values, in this type, row by row."""
    for part in _parts(values):
        yield np.ascontiguousarray(part, element).reshape(-1).view(np.uint8).data


def _parts(values: Array) -> Iterator[Array]:
    rows = max(1, _PIECE // max(1, values[:1].size))
    for first in range(0, len(values), rows):
        yield values[first : first + rows]
