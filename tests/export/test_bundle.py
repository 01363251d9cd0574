"""One call from checkpoint to bundle: whole, described, or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import export.bundle
from concertina.bundle.manifest import read_manifest
from concertina.v1 import bundle_pb2 as pb
from export.bundle import export_bundle
from export.parity import ParityError
from export.weights import load_decoder
from model.config import ModelConfig
from model.data import DatasetInfo
from model.decoder import Decoder
from tests.checkpoints import checkpoint_of, write_checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_manifest_of_a_model_of_pixels(fixed_bundle: Path) -> None:
    manifest = read_manifest(fixed_bundle)
    assert (manifest.name, manifest.version) == ("tiny-fixed", "7")
    assert manifest.modality == pb.MODALITY_IMAGE
    assert (manifest.vocabulary, manifest.context, manifest.parameters) == (7, 32, 4215)
    assert list(manifest.labels) == ["a", "b"]
    assert not manifest.HasField("end_token")
    assert (manifest.image.width, manifest.image.height) == (8, 4)
    assert manifest.image.palette == bytes(c for k in range(7) for c in (40 * k, 9, 7))
    assert (manifest.attention, manifest.fold.span) == ("fixed", 8)
    assert [file.path for file in manifest.files] == ["step.onnx", "fold.onnx"]
    assert dict(manifest.metrics) == {"bits/dim": 8.0}
    assert (manifest.training_data.source, manifest.training_data.license) == ("noise", "CC0-1.0")
    assert manifest.training_data.tokens == 1
    assert 0 < manifest.parity.max_error < manifest.parity.tolerance == 1e-4
    names = [f"{name}.{layer}" for layer in (0, 1) for name in ("keys", "values", "pooled_query")]
    assert [tensor.name for tensor in manifest.state] == names
    for tensor in manifest.state:
        if tensor.name.startswith("pooled_query"):
            assert (tensor.kind, [*tensor.shape]) == (pb.STATE_KIND_RECURRENT, [2, 8])
            assert tensor.initial < -1e38
        else:
            assert (tensor.kind, [*tensor.shape]) == (pb.STATE_KIND_STACK, [2, 11, 8])
            assert tensor.initial == 0


def test_manifest_of_a_model_of_text(full_bundle: Path) -> None:
    manifest = read_manifest(full_bundle)
    assert manifest.modality == pb.MODALITY_TEXT
    assert manifest.HasField("end_token") and manifest.end_token == 0
    assert not manifest.HasField("fold")
    assert not manifest.HasField("image")
    assert manifest.attention == "full"
    assert [tensor.name for tensor in manifest.state] == [
        "keys.0",
        "values.0",
        "keys.1",
        "values.1",
    ]
    assert {tuple(tensor.shape) for tensor in manifest.state} == {(2, 32, 8)}


@pytest.mark.usefixtures("ready_graphs")
def test_an_older_bundle_is_replaced_as_a_whole(
    fixed_bundle: Path, full_bundle: Path, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(full_bundle, tmp_path / "served"))
    (target / "tokenizer.json").write_text("of the older one")
    stages: list[str] = []
    manifest = export_bundle(
        checkpoint_of(fixed_bundle), target, name="new", version="8", on_stage=stages.append
    )
    assert read_manifest(target) == manifest
    assert (manifest.name, manifest.version) == ("new", "8")
    assert sorted(contents(target)) == ["fold.onnx", "manifest.json", "step.onnx"]
    assert [path.name for path in tmp_path.iterdir()] == ["served"]
    assert len(stages) == 3
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.usefixtures("ready_graphs")
@pytest.mark.parametrize("failing", ["export_fold", "check_parity", "write_manifest"])
def test_a_failure_leaves_the_older_bundle_and_nothing_else(
    failing: str, fixed_bundle: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ParityError("planted")

    monkeypatch.setattr(export.bundle, failing, fail)
    before = contents(copied)
    with pytest.raises(ParityError, match="planted"):
        export_bundle(checkpoint_of(fixed_bundle), copied, name="new")
    assert contents(copied) == before
    with pytest.raises(ParityError, match="planted"):
        export_bundle(checkpoint_of(fixed_bundle), copied.parent / "fresh", name="new")
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]


def test_graphs_of_other_weights_are_refused(
    fixed_bundle: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, ready_graphs: None
) -> None:
    def leave(model: Decoder) -> None:
        model.head.bias.data += 0.001

    monkeypatch.setattr(export.bundle, "round_weights", leave)
    with pytest.raises(ParityError, match=r"differ from the trained model by 0\.0"):
        export_bundle(checkpoint_of(fixed_bundle), copied, name="new")


def test_a_folder_that_is_no_bundle_is_not_replaced(fixed_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=f"{tmp_path} exists and is not a bundle"):
        export_bundle(checkpoint_of(fixed_bundle), tmp_path, name="new")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run `concertina train` first"):
        export_bundle(tmp_path, tmp_path / "bundle", name="new")
    assert not (tmp_path / "bundle").exists()


def test_sinusoid_positions_are_exact_far_into_the_context(tmp_path: Path) -> None:
    config = ModelConfig(
        7, 40_000, 16, layers=1, heads=2, mlp=24, span=200, positions="sinusoid", attention="full"
    )
    info = DatasetInfo("text", 7, "noise", "CC0-1.0")
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config, info)
    manifest = export_bundle(checkpoint, tmp_path / "bundle", name="far")
    assert manifest.parity.max_error < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "bundle" / "step.onnx")
    empty = np.zeros((1, 2, 40_000, 8), np.float32)
    for position in (0, 39_999):
        logits = session.run(
            ["logits"],
            {
                "tokens": np.array([[3]]),
                "positions": np.array([[position]]),
                "lengths": np.array([1], np.int32),
                "longest": np.array(1, np.int32),
                "rows": np.array([0]),
                "keys.0": empty,
                "values.0": empty,
            },
        )[0]
        model = load_decoder(tmp_path / "bundle").double()
        block: Any = model.blocks[0]
        x = model.embed_at(torch.tensor([[3]]), torch.tensor([[position]]))
        expected = model.head(model.norm(block(x, lambda pattern, q, k, v, x: v)))[:, 0]
        assert np.abs(logits - expected.detach().numpy()).max() < 1e-5
