"""Bundles of pretrained models: what they compute, how weights are stored, what a GPU needs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from concertina.bundle.manifest import read_manifest
from concertina.v1 import bundle_pb2 as pb
from export.bundle import export_bundle
from export.graph_file import lies_beside
from export.streaming import Graphs, Stream, prefill
from export.weights import load_decoder
from model.pretrained.convert import convert
from model.run import load_checkpoint
from tests.export.test_kernels import without_kernel
from tests.model.pretrained.architectures import ARCHITECTURES, make, save
from tests.model.pretrained.folders import TOKENIZER, tensors, write
from tests.once import one_at_a_time


def bundle_of(root: Path, name: str, half: bool = False) -> Path:
    """Folder of the bundle of an architecture, exported unless it is there; its run beside it."""
    folder = root / f"pretrained-{name}{'-half' * half}"
    with one_at_a_time(folder):
        if not folder.exists():
            run = folder.with_name(f"{folder.name}-checkpoint")
            convert(save(make(name), folder.with_name(f"{folder.name}-hf")), run)
            data_type = pb.DATA_TYPE_FLOAT16 if half else pb.DATA_TYPE_FLOAT32
            export_bundle(run, folder, name=name, data_type=data_type)
    return folder


FIRST = ("llama", "mistral", "gpt2")
"""Tried by `make test`; between them they have what the others have, but for head norms."""
EACH = [
    name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES
]


@pytest.mark.parametrize("name", EACH)
def test_streams_are_those_of_transformers(name: str, tiny_bundles: Path) -> None:
    """128 tokens of four streams: prompts of 1 to 60 tokens in chunks of 7, then one batch."""
    bundle = bundle_of(tiny_bundles, name)
    tokens = np.random.default_rng(0).integers(97, size=(4, 128))
    with torch.no_grad():
        expected = make(name)(torch.from_numpy(tokens)).logits.numpy()
    graphs = Graphs(bundle, read_manifest(bundle))
    solos, lengths = [], (1, 33, 7, 60)
    for row, length in enumerate(lengths):
        solos.append(graphs.start(1))
        got = prefill(graphs, solos[-1], tokens[row : row + 1, :length], 7, None)[0]
        np.testing.assert_allclose(got, expected[row, :length], rtol=0, atol=1e-4)
    batch = Stream(
        {key: np.concatenate([solo.state[key] for solo in solos]) for key in solos[0].state},
        np.array(lengths),
        np.array(lengths),
    )
    for _ in range(128 - max(lengths)):
        at = batch.positions.copy()
        got = graphs.step(batch, tokens[np.arange(4), at][:, None])[:, 0]
        np.testing.assert_allclose(got, expected[np.arange(4), at], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", EACH)
def test_every_node_has_a_cuda_kernel(name: str, tiny_bundles: Path) -> None:
    bundle = bundle_of(tiny_bundles, name, half=True)
    for path in bundle.glob("*.onnx"):
        assert without_kernel(onnx.load(path)) == [], path.name


def kernels(bundle: Path) -> list[dict[str, Any]]:
    """What the attention kernels are told; `packed` says whether they get q, k, v as one."""
    graph = onnx.load(bundle / "step.onnx").graph
    return [
        {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        | {"packed": not node.input[1]}
        for node in graph.node
        if node.op_type == "GroupQueryAttention"
    ]


def test_the_kernels_are_told_heads_and_windows(tiny_bundles: Path) -> None:
    scale = np.float32(16**-0.5)
    shared = {"num_heads": 4, "kv_num_heads": 2, "scale": scale, "packed": False}
    assert kernels(bundle_of(tiny_bundles, "llama")) == [shared] * 3
    windowed = {**shared, "local_window_size": 20}
    assert kernels(bundle_of(tiny_bundles, "mistral")) == [windowed] * 3
    whole = {**shared, "kv_num_heads": 4, "packed": True}
    assert kernels(bundle_of(tiny_bundles, "gpt2")) == [whole] * 3


def test_the_rotation_is_told_how_much_of_a_head_turns(tmp_path: Path) -> None:
    for share, told in ((0.5, 4), (1.0, 0)):
        settings = write(tmp_path / f"hf-{told}", partial_rotary_factor=share)
        convert(settings, tmp_path / f"run-{told}")
        export_bundle(tmp_path / f"run-{told}", tmp_path / f"{told}", name="tiny")
        graph = onnx.load(tmp_path / f"{told}" / "step.onnx").graph
        turns = [node for node in graph.node if node.op_type == "RotaryEmbedding"]
        settings_of = [{a.name: helper.get_attribute_value(a) for a in n.attribute} for n in turns]
        assert [each["rotary_embedding_dim"] for each in settings_of] == [told] * 4


def test_nothing_is_copied_between_the_rotation_and_the_kernel(tiny_bundles: Path) -> None:
    graph = onnx.load(bundle_of(tiny_bundles, "llama") / "step.onnx").graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            assert [makers[name] for name in node.input[:3]] == [
                "RotaryEmbedding",
                "RotaryEmbedding",
                "Split",
            ]
    assert Counter(makers.values())["Transpose"] == 0


def test_the_decoder_of_a_bundle_has_the_very_weights(tiny_bundles: Path) -> None:
    bundle = bundle_of(tiny_bundles, "llama")
    checkpoint = load_checkpoint(bundle.with_name(f"{bundle.name}-checkpoint"))
    loaded = load_decoder(bundle)
    assert loaded.config == checkpoint.config
    weights = checkpoint.model.state_dict()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        (torch.float32, TensorProto.FLOAT),
        (torch.float16, TensorProto.FLOAT16),
        (torch.bfloat16, TensorProto.BFLOAT16),
    ],
)
def test_weights_are_stored_as_small_as_loses_nothing(
    kind: torch.dtype, stored: int, tmp_path: Path
) -> None:
    weights = {name: 1e-6 * weight for name, weight in tensors().items()}
    if kind == torch.float16:
        weights = tensors()
    weights = {name: weight.to(kind) for name, weight in weights.items()}
    convert(write(tmp_path / "hf", weights), tmp_path / "run")
    manifest = export_bundle(tmp_path / "run", tmp_path / "bundle", name="tiny")
    graph = onnx.load(tmp_path / "bundle" / "step.onnx").graph
    matrices = {t.data_type for t in graph.initializer if len(t.dims) == 2 and t.data_type != 7}
    assert matrices == {stored}
    assert manifest.weights == {
        torch.float32: pb.DATA_TYPE_FLOAT32,
        torch.float16: pb.DATA_TYPE_UNSPECIFIED,  # as ever
        torch.bfloat16: pb.DATA_TYPE_BFLOAT16,
    }.get(kind)
    expected = load_checkpoint(tmp_path / "run").model.state_dict()
    for name, weight in load_decoder(tmp_path / "bundle").state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert manifest.parity.max_error < 1e-5


def test_the_manifest_says_what_the_source_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", _name_or_path="them/tiny")
    (folder / "tokenizer.json").write_text(TOKENIZER)
    convert(folder, tmp_path / "run", license="Apache-2.0")
    export_bundle(tmp_path / "run", tmp_path / "bundle", name="tiny")
    manifest = read_manifest(tmp_path / "bundle")
    assert (manifest.vocabulary, manifest.context) == (11, 32)
    assert (manifest.end_token, list(manifest.tokenizer.end_tokens)) == (2, [3])
    assert manifest.tokenizer.begin_token == 1
    assert (manifest.training_data.source, manifest.training_data.license) == (
        "them/tiny",
        "Apache-2.0",
    )
    assert manifest.attention == "full" and not manifest.HasField("fold")
    assert [list(t.shape) for t in manifest.state] == [[1, 32, 8]] * 4
    assert (tmp_path / "bundle" / "tokenizer.json").read_text() == TOKENIZER
    assert {file.path for file in manifest.files} == {"step.onnx", "tokenizer.json"}


def test_weights_too_large_for_a_graph_lie_beside_it(tmp_path: Path) -> None:
    weights = {name: weight.half() for name, weight in tensors().items()}
    convert(write(tmp_path / "hf", weights), tmp_path / "run")
    # 4,192 numbers in matrices and 80 in vectors
    for limit, beside in ((2 * 4192 + 4 * 80 - 1, True), (2 * 4192 + 4 * 80, False)):
        folder = tmp_path / f"{limit}"
        export_bundle(tmp_path / "run", folder, name="tiny", largest_graph=limit)
        assert lies_beside(folder / "step.onnx") == beside
