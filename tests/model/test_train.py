"""Training: it learns, it measures what it says, and a stopped run loses nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import model.train
from model.config import ROWS, ModelConfig
from model.data import IGNORED, Dataset, DatasetInfo, mask
from model.decoder import Decoder
from model.run import CHECKPOINT, CONFIG, LOG, Progress, TrainConfig, load_checkpoint, read_log
from model.train import evaluate, train

MODEL = ModelConfig(4, context=16, width=16, layers=2, heads=2, mlp=16, span=4)
RUN = TrainConfig(tokens=12 * 32, rows=2, warmup=3, dropout=0.2, evaluate_every=4, evaluate_rows=2)


class Stop(Exception):
    """Stands for the kill of a run."""


def text(length: int = 400) -> Dataset:
    run = np.random.default_rng(0).integers(4, size=length).astype(np.uint8)
    return Dataset(DatasetInfo("text", 4, "random", "CC0-1.0"), run, run[:70])


def stop_at(step: int) -> Any:
    def on_step(progress: Progress) -> None:
        if progress.step == step:
            raise Stop

    return on_step


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / CHECKPOINT)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(folder, MODEL, RUN, text())
    return folder


@pytest.mark.parametrize("stops", [(4,), (5,), (1, 6, 11), (12,)])
def test_a_stopped_run_ends_with_the_same_bits(
    stops: tuple[int, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    for step in stops:
        with pytest.raises(Stop):
            train(tmp_path, MODEL, RUN, text(), stop_at(step))
    bits = train(tmp_path, MODEL, RUN, text())
    expected = tensors(uninterrupted)
    assert any(name.startswith("optimiser.1") for name in expected)
    assert tensors(tmp_path).keys() == expected.keys()
    for name, tensor in tensors(tmp_path).items():
        assert torch.equal(tensor, expected[name]), name
    assert bits == load_checkpoint(uninterrupted).metrics["bits/byte"]


def test_going_on_begins_where_the_checkpoint_was(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(tmp_path, MODEL, RUN, text(), stop_at(6))
    steps: list[int] = []
    train(tmp_path, MODEL, RUN, text(), lambda progress: steps.append(progress.step))
    assert steps == list(range(5, 13))
    train(tmp_path, MODEL, RUN, text(), lambda progress: steps.append(progress.step))
    assert steps == list(range(5, 13))  # a finished run has nothing left to do


def test_weights_are_a_function_of_the_seed(uninterrupted: Path, tmp_path: Path) -> None:
    train(tmp_path / "same", MODEL, RUN, text())
    train(tmp_path / "other", MODEL, replace(RUN, seed=1), text())
    same, other, expected = map(tensors, (tmp_path / "same", tmp_path / "other", uninterrupted))
    name = "model.blocks.1.qkv.weight"
    assert torch.equal(same[name], expected[name])
    assert not torch.equal(other[name], expected[name])


@pytest.mark.parametrize(
    ("model", "run"),
    [(replace(MODEL, span=8), RUN), (MODEL, replace(RUN, seed=1)), (MODEL, replace(RUN, rows=3))],
)
def test_another_configuration_is_refused(
    model: ModelConfig, run: TrainConfig, uninterrupted: Path
) -> None:
    before = {path.name: path.read_bytes() for path in uninterrupted.iterdir()}
    with pytest.raises(ValueError, match=f"{uninterrupted} has a run with another config"):
        train(uninterrupted, model, run, text())
    assert {path.name: path.read_bytes() for path in uninterrupted.iterdir()} == before


def test_another_dataset_is_refused(uninterrupted: Path) -> None:
    other = replace(text(), info=replace(text().info, source="something else"))
    with pytest.raises(ValueError, match="another configuration"):
        train(uninterrupted, MODEL, RUN, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": 5}, "the model's vocabulary is 5, but this data needs 4"),
        ({"starts": 2}, "the model's starts is 2, but this data needs 1"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", replace(MODEL, **changes), RUN, text())
    assert not (tmp_path / "run").exists()


def test_an_image_model_needs_a_context_of_all_pixels(tmp_path: Path) -> None:
    info = DatasetInfo("image", 4, "x", "CC0-1.0", 3, 5, ((0, 0, 0),) * 4)
    rows = np.zeros((9, 16), np.int16)
    with pytest.raises(ValueError, match="the model's context is 16, but this data needs 15"):
        train(tmp_path, MODEL, RUN, Dataset(info, rows, rows))


@pytest.mark.parametrize("attention", ROWS)
def test_rows_of_a_model_are_rows_of_the_pictures(attention: Any, tmp_path: Path) -> None:
    info = DatasetInfo("image", 4, "x", "CC0-1.0", 8, 2, ((0, 0, 0),) * 4)
    rows = np.zeros((9, 17), np.int16)
    with pytest.raises(ValueError, match=f"{attention} has rows of 4 tokens, .* of 8 pixels"):
        train(tmp_path, replace(MODEL, attention=attention), RUN, Dataset(info, rows, rows))


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "fixed"},
        {"attention": "fixed", "pooling": "deepset-max"},
        {"attention": "full"},
        {"attention": "axial-rowmajor"},
        {"attention": "fixed-bidirectional"},  # which guesses what was hidden
    ],
    ids=lambda changes: ":".join(changes.values()),
)
def test_loss_goes_down(changes: Any, tmp_path: Path) -> None:
    run = np.tile(np.arange(4, dtype=np.uint8), 60)
    dataset = Dataset(DatasetInfo("text", 4, "counting", "CC0-1.0"), run, run[:64])
    model = replace(MODEL, **changes)
    losses: list[float] = []
    steps = 200 if model.masked else 60  # seven tokens in eight teach a masked model nothing
    settings = TrainConfig(tokens=steps * 64, rows=4, warmup=5, evaluate_every=60)
    bits = train(tmp_path, model, settings, dataset, lambda p: losses.append(p.bits))
    assert 1.5 < losses[0] < 4
    assert bits < 0.35  # where a window begins stays unknown: some three bits in sixteen tokens


@pytest.mark.parametrize("limit", [None, 2])
def test_evaluate_is_the_cross_entropy_of_what_the_model_predicts(limit: int | None) -> None:
    model = Decoder(MODEL)
    share = torch.tensor([0.5, 0.25, 0.2, 0.05])
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(share.log() + 3.0)  # a constant does not change a softmax
    dataset = text()
    windows = dataset.heldout[:64].reshape(4, 16)
    read = windows if limit is None else windows[[0, 3]]
    expected = -np.log2(share.numpy())[read].mean()
    assert evaluate(model.train(), dataset, limit, rows=3) == pytest.approx(expected, rel=1e-6)


def test_evaluate_of_a_masked_model_counts_what_was_hidden() -> None:
    model = Decoder(replace(MODEL, attention="fixed-bidirectional"))
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.5, 0.25, 0.2, 0.05]).log())
    dataset = text()
    windows = dataset.heldout[:64].reshape(4, 16).astype(np.int64)
    batches = [mask(windows[first : first + 2], 4, (first // 2,))[1] for first in (0, 2)]
    targets = np.concatenate(batches)
    asked = targets[targets != IGNORED]
    assert 4 <= len(asked) < 32
    expected = -np.log2(np.array([0.5, 0.25, 0.2, 0.05]))[asked].mean()
    assert evaluate(model, dataset, rows=2) == pytest.approx(expected, rel=1e-6)


def test_evaluate_needs_a_whole_window() -> None:
    short = replace(text(), heldout=text().heldout[:15])
    with pytest.raises(ValueError, match="shorter than one window of 16 tokens"):
        evaluate(Decoder(MODEL), short)


def test_a_checkpoint_holds_what_it_was_made_from(uninterrupted: Path) -> None:
    checkpoint = load_checkpoint(uninterrupted)
    assert (checkpoint.config, checkpoint.train, checkpoint.data) == (MODEL, RUN, text().info)
    assert checkpoint.step == 12
    assert checkpoint.metrics["tokens"] == 12 * 32
    assert checkpoint.metrics["bits/byte"] == evaluate(checkpoint.model, text())
    assert not checkpoint.model.training


def test_a_checkpoint_from_before_there_were_poolings(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / CONFIG).read_text())
    assert settings["model"].pop("pooling") == "max"
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    old, new = load_checkpoint(tmp_path), load_checkpoint(uninterrupted)
    assert old.config == new.config
    for name, tensor in new.model.state_dict().items():
        assert torch.equal(old.model.state_dict()[name], tensor), name


def test_labels_and_palette_survive_the_checkpoint(tmp_path: Path) -> None:
    info = DatasetInfo("image", 4, "x", "CC0-1.0", 4, 4, ((0, 0, 0), (9, 8, 7)) * 2, ("a", "b"))
    rows = np.random.default_rng(0).integers(2, size=(9, 17)).astype(np.int16)
    train(tmp_path, replace(MODEL, starts=3), RUN, Dataset(info, rows, rows[:2]))
    assert load_checkpoint(tmp_path).data == info
    assert "bits/dim" in load_checkpoint(tmp_path).metrics


def test_the_log_has_a_line_for_every_evaluation(uninterrupted: Path) -> None:
    lines = [json.loads(line) for line in (uninterrupted / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert [asdict(progress) for progress in read_log(uninterrupted)] == lines
    assert lines[-1]["heldout"] == load_checkpoint(uninterrupted).metrics["bits/byte"]


def test_a_step_in_the_log_is_as_it_was_done_last(tmp_path: Path) -> None:
    old = {"step": 4, "steps": 8, "bits": 3.0, "tokens_per_second": 9.0, "heldout": 2.0}
    lines = [old, {**old, "step": 8, "seconds": 5.0}, {**old, "bits": 1.0, "seconds": 2.0}]
    (tmp_path / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [(p.step, p.bits, p.seconds) for p in read_log(tmp_path)] == [
        (4, 1.0, 2.0),
        (8, 3.0, 5.0),
    ]
    (tmp_path / LOG).write_text(json.dumps(old) + "\n")  # from before seconds were written
    assert read_log(tmp_path) == [Progress(4, 8, 3.0, 9.0, 2.0, seconds=0.0)]


def test_seconds_are_those_of_all_steps_and_of_no_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def spend(seconds: float) -> float:
        nonlocal now
        now += seconds
        return now

    monkeypatch.setattr(model.train, "time", SimpleNamespace(monotonic=lambda: spend(0.25)))
    monkeypatch.setattr(model.train, "evaluate", lambda *_, **__: spend(100.0))
    with pytest.raises(Stop):
        train(tmp_path, MODEL, RUN, text(), stop_at(6))
    seen: list[Progress] = []
    train(tmp_path, MODEL, RUN, text(), seen.append)
    assert [(p.step, p.seconds) for p in seen] == [(n, n / 4) for n in range(5, 13)]
    assert [p.seconds for p in read_log(tmp_path)] == [1.0, 2.0, 3.0]
    assert all(p.tokens_per_second == 32 / 0.25 for p in seen)


def test_no_partial_file_is_left(uninterrupted: Path) -> None:
    assert {path.name for path in uninterrupted.iterdir()} == {CHECKPOINT, CONFIG, LOG}


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no {CHECKPOINT}"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["tokens", "rows", "warmup", "evaluate_every", "evaluate_rows"])
def test_settings_below_one_are_refused(name: str) -> None:
    settings: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        TrainConfig(**settings)


def test_rates_warm_up_then_fall_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def record(self: torch.optim.AdamW, *arguments: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    train(tmp_path, MODEL, replace(RUN, rate=0.3), text())
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.3])
    assert sorted(rates[3:], reverse=True) == rates[3:]
    assert 0 < rates[-1] < 0.02
