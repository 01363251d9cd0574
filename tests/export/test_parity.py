"""The parity check passes what was trained and refuses every way in which a graph can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from concertina.bundle.manifest import read_manifest
from export.parity import TOLERANCE, ParityError, check_parity
from export.weights import load_decoder

Tamper = Callable[[onnx.GraphProto], None]


def change_weight(name: str, change: Callable[[np.ndarray], None]) -> Tamper:
    def tamper(graph: onnx.GraphProto) -> None:
        (tensor,) = (tensor for tensor in graph.initializer if tensor.name == name)
        values = numpy_helper.to_array(tensor).copy()
        change(values)
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    return tamper


def change_operator(old: str, new: str, which: int) -> Tamper:
    def tamper(graph: onnx.GraphProto) -> None:
        [node for node in graph.node if node.op_type == old][which].op_type = new

    return tamper


def swap_outputs(one: str, other: str) -> Tamper:
    swapped = {one: other, other: one}

    def tamper(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            node.output[:] = [swapped.get(name, name) for name in node.output]

    return tamper


def scale_attention(scale: float) -> Tamper:
    def tamper(graph: onnx.GraphProto) -> None:
        node = [node for node in graph.node if node.op_type == "GroupQueryAttention"][1]
        (attribute,) = (a for a in node.attribute if a.name == "scale")
        attribute.CopyFrom(helper.make_attribute("scale", scale))

    return tamper


def add(amount: float) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values.flat[3] += amount

    return change


@pytest.mark.parametrize("attention", ["fixed", "full"])
def test_what_was_exported_passes(attention: str, request: pytest.FixtureRequest) -> None:
    bundle: Path = request.getfixturevalue(f"{attention}_bundle")
    found = check_parity(bundle, read_manifest(bundle), load_decoder(bundle), seed=1)
    assert 0 < found.max_error < 1e-5 < found.tolerance == TOLERANCE
    length = 26
    assert found.positions == 3 * length + length * (length - 1) // 2 + 4 * length


@pytest.mark.parametrize(
    ("file", "tamper"),
    [
        ("step.onnx", change_weight("model.head.bias", add(0.001))),
        ("step.onnx", change_weight("model.head.bias", add(float("nan")))),
        ("step.onnx", change_weight("model.positions.offset.weight.half", add(0.05))),
        ("step.onnx", scale_attention(0.9)),
        ("step.onnx", change_operator("ReduceMax", "ReduceMean", 0)),
        ("step.onnx", change_operator("ReduceMax", "ReduceMin", 1)),
        ("step.onnx", change_operator("Max", "Min", 0)),
        ("fold.onnx", change_operator("ReduceMax", "ReduceMean", 0)),
        ("fold.onnx", change_operator("ReduceMax", "ReduceMean", 1)),
        ("fold.onnx", swap_outputs("next.keys.1", "next.values.1")),
        ("fold.onnx", swap_outputs("next.values.0", "next.values.1")),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_tampered_graph_is_refused(file: str, tamper: Tamper, copied: Path) -> None:
    manifest = read_manifest(copied)
    decoder = load_decoder(copied)
    model = onnx.load(copied / file)
    tamper(model.graph)
    onnx.save(model, copied / file)
    with pytest.raises(ParityError, match="the exported graphs differ from the trained model by"):
        check_parity(copied, manifest, decoder)


def test_a_query_maximum_that_starts_at_zero_is_refused(fixed_bundle: Path) -> None:
    manifest = read_manifest(fixed_bundle)
    for tensor in manifest.state:
        tensor.initial = 0.0
    with pytest.raises(ParityError):
        check_parity(fixed_bundle, manifest, load_decoder(fixed_bundle))


@pytest.mark.parametrize("span", [7, 9, 16])
def test_a_schedule_of_another_span_is_refused(span: int, fixed_bundle: Path) -> None:
    manifest = read_manifest(fixed_bundle)
    manifest.fold.span = span
    with pytest.raises(Exception, match=r"differ|INVALID_ARGUMENT|dimension"):
        check_parity(fixed_bundle, manifest, load_decoder(fixed_bundle))
