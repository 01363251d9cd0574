"""What lies in the graphs: their inputs, what they compute with, and the weights they came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from concertina.bundle.manifest import read_manifest
from concertina.v1 import bundle_pb2 as pb
from export.weights import load_decoder, round_weights
from model.run import load_checkpoint

ROOT = Path(__file__).parents[2]
ENTRIES = {"fixed": 11, "full": 32}  # of a stack; no other size in the graphs is this number
STEP_INPUTS = {
    "tokens": (TensorProto.INT64, 2),
    "positions": (TensorProto.INT64, 2),
    "lengths": (TensorProto.INT32, 1),
    "longest": (TensorProto.INT32, 0),
    "rows": (TensorProto.INT64, 1),
}


@pytest.fixture(params=["fixed", "full"])
def bundle(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"{request.param}_bundle")
    return folder


def shape_of(value: onnx.ValueInfoProto) -> list[int | str]:
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_param or dim.dim_value for dim in dims]


def shapes(graph: onnx.GraphProto) -> dict[str, list[int | str]]:
    """Shape of every named tensor; a size that is not fixed is a string."""
    known = {v.name: shape_of(v) for v in (*graph.input, *graph.output, *graph.value_info)}
    known.update({tensor.name: list(tensor.dims) for tensor in graph.initializer})
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in known:
            known.setdefault(node.output[0], known[node.input[0]])
    return known


def test_step_takes_the_batch_then_the_state_and_gives_logits_then_the_state(bundle: Path) -> None:
    graph = onnx.load(bundle / "step.onnx").graph
    state = read_manifest(bundle).state
    assert [value.name for value in graph.input] == [*STEP_INPUTS, *(t.name for t in state)]
    assert [v.name for v in graph.output] == ["logits", *(f"next.{t.name}" for t in state)]
    inputs = {value.name: value for value in graph.input}
    for name, (element, rank) in STEP_INPUTS.items():
        assert inputs[name].type.tensor_type.elem_type == element
        assert len(shape_of(inputs[name])) == rank
    for tensor in state:
        for value in (inputs[tensor.name], *graph.output):
            if value.name in (tensor.name, f"next.{tensor.name}"):
                batch, *rest = shape_of(value)
                assert isinstance(batch, str)
                assert rest == list(tensor.shape)
                assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    assert shape_of(graph.output[0])[1] == 7


def test_fold_takes_open_blocks_and_gives_one_entry(fixed_bundle: Path) -> None:
    graph = onnx.load(fixed_bundle / "fold.onnx").graph
    state = read_manifest(fixed_bundle).state
    assert [value.name for value in graph.input] == [t.name for t in state]
    assert [value.name for value in graph.output] == [f"next.{t.name}" for t in state]
    for tensor, taken, given in zip(state, graph.input, graph.output, strict=True):
        if tensor.kind == pb.STATE_KIND_STACK:
            assert shape_of(taken)[1:] == [2, 8, 8]
            assert shape_of(given)[1:] == [2, 1, 8]
        else:
            assert shape_of(taken)[1:] == shape_of(given)[1:] == [2, 8]
        assert isinstance(shape_of(taken)[0], str)


def test_full_attention_has_nothing_to_fold(full_bundle: Path) -> None:
    assert sorted(path.name for path in full_bundle.iterdir()) == ["manifest.json", "step.onnx"]


def test_operators_are_those_the_runtime_knows(bundle: Path) -> None:
    model = onnx.load(bundle / "step.onnx")
    assert {o.domain: o.version for o in model.opset_import} == {"": 18, "com.microsoft": 1}
    assert {node.domain for node in model.graph.node} == {"", "com.microsoft"}
    kernels = [node for node in model.graph.node if node.domain]
    assert [node.op_type for node in kernels] == ["GroupQueryAttention"] * 2
    for node in kernels:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        scale = attributes.pop("scale")
        assert attributes == {"num_heads": 2, "kv_num_heads": 2}
        assert scale == np.float32(8**-0.5)


def test_the_attention_kernel_takes_one_product_whole(bundle: Path) -> None:
    graph = onnx.load(bundle / "step.onnx").graph
    makers = {name: node for node in graph.node for name in node.output}
    operators = [node.op_type for node in graph.node]
    for node in (node for node in graph.node if node.op_type == "GroupQueryAttention"):
        assert makers[node.input[0]].op_type == "MatMul"
        assert node.input[1] == node.input[2] == ""
    assert "Split" not in operators
    assert operators.count("Slice") == (2 if bundle.name == "fixed" else 0)  # pooled queries


def test_only_the_attention_kernel_sees_the_whole_stack(bundle: Path) -> None:
    entries = ENTRIES[bundle.name]
    graph = onnx.load(bundle / "step.onnx").graph
    known = shapes(graph)
    seeing = set()
    for node in graph.node:
        names = [name for name in (*node.input, *node.output) if name]
        assert set(names) <= known.keys()
        if any(entries in known[name] for name in names):
            seeing.add(node.op_type)
    assert seeing == {"GroupQueryAttention"}


def test_tables_over_the_context_are_only_looked_up(bundle: Path) -> None:
    graph = onnx.load(bundle / "step.onnx").graph
    tables = {"model.positions.block.weight", "model.positions.offset.weight", "model.embed.weight"}
    users = [(node.op_type, table) for node in graph.node for table in tables & {*node.input}]
    assert sorted(users) == sorted(("Gather", table) for table in tables)


def test_matrices_are_stored_in_half_and_vectors_in_full(bundle: Path) -> None:
    graph = onnx.load(bundle / "step.onnx").graph
    elements = {True: 0, False: 0}
    for tensor in graph.initializer:
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16):
            is_matrix = len(tensor.dims) >= 2
            assert (tensor.data_type == TensorProto.FLOAT16) == is_matrix
            elements[is_matrix] += onnx.numpy_helper.to_array(tensor).size
    parameters = read_manifest(bundle).parameters
    assert parameters <= sum(elements.values()) < parameters + 10
    assert (bundle / "step.onnx").stat().st_size < 2 * parameters + 24_000


def test_no_path_of_the_machine_that_exported(bundle: Path) -> None:
    for path in bundle.iterdir():
        content = path.read_bytes()
        assert str(ROOT).encode() not in content
        assert b".py" not in content


def test_decoder_of_a_bundle_has_the_weights_it_was_exported_from(bundle: Path) -> None:
    trained = load_checkpoint(bundle.with_name(f"{bundle.name}-checkpoint"))
    loaded = load_decoder(bundle)
    assert loaded.config == trained.config
    assert not loaded.training
    original = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    round_weights(trained.model)
    for name, expected in trained.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], expected), name
        assert torch.equal(expected, original[name]) == (expected.ndim < 2), name
        assert (expected - original[name]).abs().max() < 2e-3 * original[name].abs().max()


def test_a_graph_of_someone_else_is_named(copied: Path) -> None:
    (copied / "fold.onnx").unlink()
    model = onnx.load(copied / "step.onnx")
    del model.metadata_props[:]
    onnx.save(model, copied / "step.onnx")
    with pytest.raises(ValueError, match=r"copied was not exported by Concertina"):
        load_decoder(copied)
