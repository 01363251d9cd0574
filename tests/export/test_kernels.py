"""Every node of what is exported for a GPU has a CUDA kernel for its types, says onnxruntime.

No GPU is needed: the kernels are those of the table beside this file.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from concertina.bundle.manifest import read_manifest
from concertina.v1 import bundle_pb2 as pb
from export.graphs import export_fold, export_step, layers, state_tensors
from export.moves import export_moves
from tests.checkpoints import export_tiny, narrow_tiny, quantise_tiny, random_decoder
from tests.model.cases import CAUSAL, Case

TRIED_FIRST = ("axial-rowmajor",)
_TABLE = json.loads(Path(__file__).with_name("cuda_kernels.json").read_text())
_KERNELS = {(kernel["domain"], kernel["op"]): kernel for kernel in _TABLE["kernels"]}
_NAMES = {  # as the table writes them
    onnx.TensorProto.FLOAT: "float",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.DOUBLE: "double",
    onnx.TensorProto.BOOL: "bool",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.UINT8: "uint8",
    onnx.TensorProto.INT8: "int8",
}


def element_types(model: onnx.ModelProto) -> dict[str, str]:
    """The type of every tensor in a graph, by name."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {name: _NAMES.get(element, f"type {element}") for name, element in types.items()}


def without_kernel(model: onnx.ModelProto) -> list[str]:
    """What no CUDA kernel computes: the operator and why."""
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    types = element_types(model)
    found = []
    for node in model.graph.node:
        kernel = _KERNELS.get((node.domain, node.op_type))
        why = _misfit(node, kernel, opsets[node.domain], types) if kernel else "not in the table"
        if why:
            found.append(f"{node.op_type}: {why}")
    return found


def _misfit(
    node: onnx.NodeProto, kernel: dict[str, Any], opset: int, types: dict[str, str]
) -> str | None:
    first, last = kernel["opset"]
    if not first <= opset <= (last or opset):
        return f"opset {opset} is not in {first} … {last}"
    bound: dict[str, str] = {}
    for names, variables in ((node.input, kernel["inputs"]), (node.output, kernel["outputs"])):
        if variables[-1].endswith("..."):
            variables = [variables[-1].removesuffix("...")] * len(names)
        if len(names) > len(variables):
            return f"{len(names)} values where it has {len(variables)}"
        for name, variable in zip(names, variables, strict=False):
            if not name:
                continue
            element = types.get(name, "unknown")
            if element not in kernel["types"].get(variable, variable).split():
                return f"{name} is {element}"
            if bound.setdefault(variable, element) != element:
                return f"{name} is {element}, others of {variable} are {bound[variable]}"
    return None


@pytest.fixture(
    params=[
        *("fixed", "full", "logsparse", "folded:fitted"),
        *(
            pytest.param(pattern, marks=pytest.mark.slow)
            for pattern in ("mixture", "folded:max", "folded:tangent")
        ),
    ]
)
def half_bundle(request: pytest.FixtureRequest, tiny_bundles: Path) -> Path:
    return export_tiny(tiny_bundles, request.param, half=True)


def test_every_node_has_a_cuda_kernel(half_bundle: Path) -> None:
    graphs = sorted(path.name for path in half_bundle.glob("*.onnx"))
    folds = [] if half_bundle.name == "full-half" else ["fold.onnx"]
    assert graphs == [*folds, "put.onnx", "step.onnx", "take.onnx"]
    for name in graphs:
        assert without_kernel(onnx.load(half_bundle / name)) == [], name


@pytest.mark.parametrize(
    "case",
    [
        case if str(case) in TRIED_FIRST else pytest.param(case, marks=pytest.mark.slow)
        for case in CAUSAL
        if str(case) not in ("fixed", "full", "logsparse", "mixture")  # see half_bundle
    ],
    ids=str,
)
def test_every_pattern_has_graphs_for_a_gpu(case: Case, tmp_path: Path) -> None:
    """Their numbers are held elsewhere: here the graphs alone are exported."""
    model = random_decoder(replace(case.config(32, span=8), layers=1, mlp=24))
    half = pb.DATA_TYPE_FLOAT16
    export_step(model, tmp_path / "step.onnx", half)
    if layers(model)[0].schedule is not None:
        export_fold(model, tmp_path / "fold.onnx", half)
    export_moves(state_tensors(model, half), tmp_path)
    for path in tmp_path.glob("*.onnx"):
        assert without_kernel(onnx.load(path)) == [], path.name


@pytest.mark.parametrize("bits", [4, 8])
def test_matrices_in_few_bits_have_a_cuda_kernel(bits: int, tiny_bundles: Path) -> None:
    bundle = quantise_tiny(export_tiny(tiny_bundles, "fixed", half=True), bits)
    model = onnx.load(bundle / "step.onnx")
    assert "MatMulNBits" in {node.op_type for node in model.graph.node}
    assert without_kernel(model) == []


def test_attention_in_float32_is_refused(fixed_bundle: Path) -> None:
    (one, other) = without_kernel(onnx.load(fixed_bundle / "step.onnx"))
    assert one.startswith("GroupQueryAttention: ") and one.endswith(" is float")
    assert other.startswith("GroupQueryAttention: ")


def test_int8_caches_have_no_cuda_kernel(fixed_bundle: Path) -> None:
    """It would take float16 queries, which the CPU's does not: a server refuses such bundles."""
    model = onnx.load(narrow_tiny(fixed_bundle) / "step.onnx")
    assert {why.split(":")[0] for why in without_kernel(model)} == {"GroupQueryAttention"}


def test_what_the_table_does_not_say_is_refused(fixed_bundle: Path) -> None:
    model = onnx.load(fixed_bundle / "fold.onnx")
    assert without_kernel(model) == []
    pools = [node for node in model.graph.node if node.op_type == "ReduceMax"]
    pools[0].op_type = "ReduceMedian"
    assert without_kernel(model) == ["ReduceMedian: not in the table"]
    pools[0].op_type = "ReduceMax"
    model.opset_import[0].version = 17
    assert "ReduceMax: opset 17 is not in 18 … None" in without_kernel(model)


def test_caches_are_float16_and_what_every_step_changes_is_not(half_bundle: Path) -> None:
    manifest = read_manifest(half_bundle)
    for tensor in manifest.state:
        recurrent = tensor.kind == pb.STATE_KIND_RECURRENT
        assert tensor.data_type == (pb.DATA_TYPE_FLOAT32 if recurrent else pb.DATA_TYPE_FLOAT16)
    assert {"take.onnx", "put.onnx"} <= {file.path for file in manifest.files}
    assert 1e-5 < manifest.parity.max_error < manifest.parity.tolerance < 0.1
