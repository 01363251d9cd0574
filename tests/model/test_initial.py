"""A run that begins with the weights of another one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from concertina.bundle.manifest import read_manifest
from export.streaming import Graphs, prefill
from export.weights import load_decoder
from model.config import ModelConfig
from model.data import Dataset, DatasetInfo
from model.decoder import Decoder
from model.initial import read_initial
from model.run import CHECKPOINT, CONFIG, RunError, TrainConfig, load_checkpoint
from model.train import evaluate, train
from tests.checkpoints import checkpoint_of, quantise_tiny, random_decoder, write_checkpoint

MODEL = ModelConfig(4, context=16, width=16, layers=2, heads=2, mlp=16, span=4)
RUN = TrainConfig(tokens=4 * 32, rows=2, warmup=3, rate=1e-6, weight_decay=0.0)


class Crash(Exception):
    """Stands for the kill of a run."""


def text() -> Dataset:
    run = np.random.default_rng(0).integers(4, size=400).astype(np.uint8)
    return Dataset(DatasetInfo("text", 4, "random", "CC0-1.0"), run, run[:70])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base", MODEL, text().info)


@pytest.mark.parametrize("attention", ["fixed", "full"])  # whose weights have the same shapes
def test_a_run_begins_with_the_weights_of_another(
    attention: Any, base: Path, tmp_path: Path
) -> None:
    model = replace(MODEL, attention=attention)
    bits = train(tmp_path / "new", model, RUN, text(), init=base)
    weights, expected = load_file(tmp_path / "new" / CHECKPOINT), load_file(base / CHECKPOINT)
    for name, tensor in expected.items():
        assert torch.allclose(weights[name], tensor, atol=1e-4), name
    assert bits == pytest.approx(evaluate(random_decoder(model), text()), abs=1e-2)
    config = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert config["init"] == {"run": str(base), "step": 1}


def test_a_stopped_run_does_not_begin_again(base: Path, tmp_path: Path) -> None:
    def crash(progress: Any) -> None:
        if progress.step == 3:
            raise Crash

    run = replace(RUN, rate=0.01)
    train(tmp_path / "whole", MODEL, run, text(), init=base)
    with pytest.raises(Crash):
        train(tmp_path / "new", MODEL, run, text(), crash, init=base, save_every_s=0)
    (base / CHECKPOINT).unlink()  # is not needed any more
    started: list[int] = []
    train(
        tmp_path / "new",
        MODEL,
        run,
        text(),
        init=base,
        on_start=lambda step, _: started.append(step),
    )
    assert started == [3]
    weights, expected = (load_file(tmp_path / name / CHECKPOINT) for name in ("new", "whole"))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert "init" in json.loads((tmp_path / "new" / CONFIG).read_text())


def refused(init: Path, folder: Path, message: str, model: ModelConfig = MODEL) -> None:
    with pytest.raises(RunError, match=message):
        train(folder, model, RUN, text(), init=init)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp": 32}, r"mlp is 32, there 16 \(so blocks.0.down.weight is 16x32, there 16x16; "),
        (
            {"width": 32, "span": 8},
            r"width is 32, there 16; span is 8, there 4 \(so .* and \d+ more",
        ),
        ({"layers": 3}, r"layers is 3, there 2 \(so blocks.2.down.weight is 16x16, there missing"),
        ({"pooling": "deepset-max"}, "pooling is 'deepset-max', there 'max'"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    changes: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    refused(base, tmp_path / "new", message, replace(MODEL, **changes))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "gone", tmp_path / "new", "gone is neither a run nor a bundle")


@pytest.mark.parametrize("pattern", ["fixed", "full"])  # of pixels with labels, and of text
def test_a_model_begins_with_what_a_bundle_computes(
    pattern: str, fixed_bundle: Path, full_bundle: Path
) -> None:
    bundle = fixed_bundle if pattern == "fixed" else full_bundle
    exported, manifest = load_checkpoint(checkpoint_of(bundle)), read_manifest(bundle)
    initial = read_initial(bundle, exported.config, exported.data)
    tokens = np.random.default_rng(0).integers(manifest.vocabulary, size=(1, manifest.context))
    tokens[:, 0] = manifest.vocabulary + len(manifest.labels)
    graphs = Graphs(bundle, manifest)
    expected = prefill(graphs, graphs.start(1), tokens, 5, None)
    with torch.no_grad():
        logits = initial.model(torch.from_numpy(tokens)).numpy()
        trained = exported.model(torch.from_numpy(tokens)).numpy()
    assert np.abs(logits - expected).max() < 1e-4
    assert np.abs(trained - expected).max() > 1e-3  # those are not rounded
    assert initial.origin == {"bundle": str(bundle), "fingerprint": manifest.fingerprint}


def test_a_run_begins_with_the_weights_of_a_bundle(full_bundle: Path, tmp_path: Path) -> None:
    exported = load_checkpoint(checkpoint_of(full_bundle))
    stream = np.random.default_rng(0).integers(7, size=400).astype(np.uint8)
    data = Dataset(exported.data, stream, stream[:70])
    told: list[str] = []
    folder = tmp_path / "new"
    bits = train(
        *(folder, exported.config, RUN, data),
        on_start=lambda step, initial: told.append(f"{step} {initial}"),
        init=full_bundle,
    )
    assert bits == pytest.approx(evaluate(load_decoder(full_bundle), data), abs=1e-2)
    assert abs(bits - evaluate(Decoder(exported.config), data)) > 0.1
    assert told == [f"0 the weights of the bundle {full_bundle}, rounded to float16 there"]
    assert json.loads((folder / CONFIG).read_text())["init"]["bundle"] == str(full_bundle)


def test_bundles_that_give_no_weights_are_named(
    full_bundle: Path, fixed_bundle: Path, tmp_path: Path
) -> None:
    exported = load_checkpoint(checkpoint_of(full_bundle))
    few_bits = quantise_tiny(full_bundle, 8)
    broken, bare, strange = (tmp_path / name for name in ("broken", "bare", "strange"))
    for folder in (broken, bare, strange):
        shutil.copytree(full_bundle, folder)
    (broken / "step.onnx").write_bytes((full_bundle / "step.onnx").read_bytes()[:999])
    (bare / "manifest.json").unlink()
    graph = onnx.load(strange / "step.onnx")
    del graph.metadata_props[:]
    onnx.save(graph, strange / "step.onnx")
    for bundle, message in (
        (
            few_bits,
            "few bits, .*: name the run that it was exported from, or its bundle of float16",
        ),
        (broken, "the bundle .*broken is damaged"),
        (bare, "the bundle .*bare cannot be read: .*manifest.json"),
        (strange, "the graphs of .*strange are not of Concertina"),
        (fixed_bundle, "has a model of image, but the data is text"),
    ):
        with pytest.raises(RunError, match=message):
            read_initial(bundle, exported.config, exported.data)
    wider = replace(exported.config, mlp=32)
    with pytest.raises(RunError, match=r"do not fit: mlp is 32, there 24 "):
        read_initial(full_bundle, wider, exported.data)


def test_weights_of_another_modality_are_refused(tmp_path: Path) -> None:
    info = DatasetInfo("image", 4, "x", "CC0-1.0", 4, 4, ((0, 0, 0),) * 4)
    base = write_checkpoint(tmp_path / "base", MODEL, info)
    refused(base, tmp_path / "new", "has a model of image, but the data is text")
