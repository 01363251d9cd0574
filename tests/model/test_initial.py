"""A run that begins with the weights of another one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.config import ModelConfig
from model.data import Dataset, DatasetInfo
from model.run import CHECKPOINT, CONFIG, RunError, TrainConfig
from model.train import evaluate, train
from tests.checkpoints import random_decoder, write_checkpoint

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
    train(tmp_path / "new", MODEL, run, text(), init=base, on_start=started.append)
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
    refused(tmp_path / "gone", tmp_path / "new", "gone is not a run")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "step.onnx").touch()
    refused(
        tmp_path / "bundle", tmp_path / "new", "is a bundle: .* the run that it was exported from"
    )


def test_weights_of_another_modality_are_refused(tmp_path: Path) -> None:
    info = DatasetInfo("image", 4, "x", "CC0-1.0", 4, 4, ((0, 0, 0),) * 4)
    base = write_checkpoint(tmp_path / "base", MODEL, info)
    refused(base, tmp_path / "new", "has a model of image, but the data is text")
