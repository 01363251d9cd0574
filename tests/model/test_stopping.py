"""A run that is stopped, in every way a run is stopped, ends as if nobody had touched it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import model.train
from concertina.cli.main import main
from model.config import ModelConfig
from model.data import Dataset, DatasetInfo, save_dataset
from model.initial import Initial
from model.run import CHECKPOINT, CONFIG, LOG, Progress, RunError, TrainConfig, read_log
from model.stopping import on_signals
from model.train import Diverged, Stopped, train

MODEL = ModelConfig(4, context=16, width=16, layers=2, heads=2, mlp=16, span=4)
RUN = TrainConfig(tokens=12 * 32, rows=2, warmup=3, dropout=0.2, evaluate_every=4, evaluate_rows=2)
ARGUMENTS = (
    *("--context", "16", "--span", "4", "--width", "16", "--layers", "2", "--heads", "2"),
    *("--mlp", "16", "--rows", "2", "--threads", "1", "--dropout", "0.2"),
)


class Crash(Exception):
    """Stands for the kill of a run."""


def text(length: int = 400, heldout: int = 70) -> Dataset:
    run = np.random.default_rng(0).integers(4, size=length).astype(np.uint8)
    return Dataset(DatasetInfo("text", 4, "random", "CC0-1.0"), run, run[:heldout])


def assert_same(folder: Path, expected: Path) -> None:
    here, there = load_file(folder / CHECKPOINT), load_file(expected / CHECKPOINT)
    assert here.keys() == there.keys()
    for name, tensor in there.items():
        assert torch.equal(here[name], tensor), name


def stop_after(calls: int) -> Any:
    def stop() -> bool:
        nonlocal calls
        calls -= 1
        return calls < 0

    return stop


def crash_at(step: int) -> Any:
    def on_step(progress: Progress) -> None:
        if progress.step == step:
            raise Crash

    return on_step


@contextmanager
def training(dataset: Path, out: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "concertina.cli.main", "train", str(dataset), str(out)]
    process = subprocess.Popen(
        [*command, *ARGUMENTS, *arguments], stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(folder, MODEL, RUN, text())
    return folder


@pytest.mark.e2e
def test_signals_save_a_run_that_goes_on_from_there(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "runs" / "here"
    save_dataset(data, text())
    steps = 900
    tokens = ("--tokens", str(steps * 32))
    done = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        with training(data, out, *tokens) as process:
            assert process.stderr is not None
            first = process.stderr.readline()
            assert (f"resumed at step {done} of {steps}" in first) == bool(done)
            assert process.stderr.readline().startswith(f"step {done + 1} of {steps}: ")
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        found = re.search(rf"stopped at step (\d+) of {steps}, saved in {out}: the same", said)
        assert found, said
        assert process.returncode == 128 + number
        assert done < int(found[1]) < steps
        done = int(found[1])
    with training(data, out, *tokens) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f"resumed at step {done} of {steps}" in said
    assert f"step {steps} of {steps}: " in said
    train(
        tmp_path / "there",
        replace(MODEL),
        TrainConfig(tokens=900 * 32, rows=2, dropout=0.2),
        text(),
    )
    assert_same(out, tmp_path / "there")


@pytest.mark.parametrize("calls", (1, 4, 7, 9, 14))  # three of them while it evaluates
def test_a_run_asked_to_stop_is_saved(calls: int, uninterrupted: Path, tmp_path: Path) -> None:
    started: list[int] = []
    seen: list[int] = []
    with pytest.raises(Stopped, match=rf"stopped at step \d+ of 12, saved in {tmp_path}: ") as stop:
        train(tmp_path, MODEL, RUN, text(), lambda p: seen.append(p.step), stop=stop_after(calls))
    step = int(str(stop.value).split()[3])
    assert step in (len(seen), len(seen) + 1)  # a step that is not evaluated yet is not shown
    train(tmp_path, MODEL, RUN, text(), on_start=lambda step, _: started.append(step))
    assert started == [step]
    assert_same(tmp_path, uninterrupted)
    assert [p.step for p in read_log(tmp_path)] == [4, 8, 12]
    assert [p.heldout for p in read_log(tmp_path)] == [p.heldout for p in read_log(uninterrupted)]


def test_a_run_stopped_before_its_first_step_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="before the first step was done: nothing is saved"):
        train(tmp_path / "runs" / "a", MODEL, RUN, text(), stop=lambda: True)
    assert not list(tmp_path.iterdir())


def test_checkpoints_come_with_time(uninterrupted: Path, tmp_path: Path) -> None:
    for step in (3, 7):
        with pytest.raises(Crash):
            train(tmp_path, MODEL, RUN, text(), crash_at(step), save_every_s=0)
    started: list[int] = []
    train(tmp_path, MODEL, RUN, text(), on_start=lambda step, _: started.append(step))
    assert started == [7]
    assert_same(tmp_path, uninterrupted)


def test_a_second_signal_is_not_caught() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), on_signals() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request() and request.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    assert signal.getsignal(signal.SIGINT) is before


def test_what_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_signals() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def spoil(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Make the weights NaN in a step of the optimiser."""
    step = torch.optim.AdamW.step

    def spoiled(self: torch.optim.AdamW, *arguments: Any) -> Any:
        nonlocal calls
        calls -= 1
        result = step(self, *arguments)
        if calls == 0:
            for weight in self.param_groups[0]["params"]:
                weight.data.fill_(float("nan"))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiled)


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        (7, "the loss is nan after 7 of 12 steps"),
        (8, "the loss on held-out data is nan after 8 of 12 steps"),
    ],
)
def test_a_loss_that_is_no_number_stops_the_run(
    spoiled: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Crash):
        train(tmp_path, MODEL, RUN, text(), crash_at(4))
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    spoil(monkeypatch, spoiled - 4)
    with pytest.raises(Diverged) as error:
        train(tmp_path, MODEL, RUN, text())
    assert message in str(error.value)
    assert f"the checkpoint of step 4 is kept in {tmp_path}" in str(error.value)
    assert "--rate 0.001" in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_a_checkpoint_by_time_never_holds_what_is_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 3)
    with pytest.raises(Diverged, match=r"a weight of .* is nan after 3 of 12 steps"):
        train(tmp_path, MODEL, RUN, text(), save_every_s=0)
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / CHECKPOINT).values())


def test_a_rate_that_is_too_high_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_dataset(tmp_path / "data", text())
    out = tmp_path / "runs" / "here"
    arguments = (str(tmp_path / "data"), str(out), *ARGUMENTS, "--tokens", "9600")
    monkeypatch.setattr(sys, "argv", ["concertina", "train", *arguments, "--rate", "1000"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "The rate of 1000 is too high" in said and "start again with --rate 0.01" in said
    assert not out.parent.exists()


def test_a_gradient_that_is_no_number_is_not_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        model.train.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("inf"))
    )
    with pytest.raises(Diverged, match="the norm of the gradient is inf after 0 of 12 steps"):
        train(tmp_path, MODEL, RUN, text())


def refuse(folder: Path, dataset: Dataset, message: str, config: ModelConfig = MODEL) -> None:
    with pytest.raises(RunError, match=message):
        train(folder / "runs" / "a", config, RUN, dataset)
    assert not list(folder.iterdir())


def test_data_that_cannot_be_used_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    refuse(tmp_path, text(heldout=15), "held-out data has 15 tokens, fewer than one window of 16")
    refuse(tmp_path, text(15), "training data has 15 tokens, fewer than one window of 16")
    high = replace(text(), heldout=text().heldout + 1)
    refuse(tmp_path, high, "held-out data has tokens from 1 to 4, but the vocabulary is 4")
    info = DatasetInfo("image", 4, "x", "CC0-1.0", 4, 4, ((0, 0, 0),) * 4)
    rows = np.zeros((9, 17), np.int16) - np.eye(17, dtype=np.int16)[0]
    refuse(tmp_path, Dataset(info, rows, rows[:0]), "held-out data has no images")
    marked = rows.copy()
    marked[3, 0] = 1
    refuse(tmp_path, Dataset(info, marked, rows), "training data has labels from -1 to 1")


def test_a_full_disk_is_seen_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refuse(tmp_path, text(), "has 0 MB free, and two checkpoints take")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"dataset.json": "{}"}, "has files and no run"),
        ({CONFIG: '{"architectures": []}', CHECKPOINT: ""}, "is not the configuration of a run"),
        ({CONFIG: "[", CHECKPOINT: ""}, "is not the configuration of a run"),
    ],
)
def test_a_folder_of_something_else_is_not_touched(
    files: dict[str, str], message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(RunError, match=message):
        train(tmp_path, MODEL, RUN, text())
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_a_start_that_was_killed_does_not_bind_the_next(tmp_path: Path) -> None:
    def killed(step: int, initial: Initial | None) -> None:
        (tmp_path / "copy").mkdir()
        config = (tmp_path / "run" / CONFIG).read_text()
        (tmp_path / "copy" / CONFIG).write_text(config)
        raise Crash

    with pytest.raises(Crash):
        train(tmp_path / "run", MODEL, RUN, text(), on_start=killed)
    assert not (tmp_path / "run").exists()
    other = replace(RUN, rate=0.02)
    train(tmp_path / "copy", MODEL, other, text())
    assert json.loads((tmp_path / "copy" / CONFIG).read_text())["train"]["rate"] == 0.02


def test_a_changed_setting_is_named(uninterrupted: Path) -> None:
    with pytest.raises(RunError, match=r"\(span is 8, there it is 4; rate is 0.02, there it is 0"):
        train(uninterrupted, replace(MODEL, span=8), replace(RUN, rate=0.02), text())


def test_every_line_of_the_log_is_json(uninterrupted: Path) -> None:
    def refuse_constant(name: str) -> None:
        raise AssertionError(name)

    for line in (uninterrupted / LOG).read_text().splitlines():
        json.loads(line, parse_constant=refuse_constant)


@pytest.mark.parametrize(
    "changes",
    [
        *({"rate": rate} for rate in (0.0, -1.0, float("nan"), float("inf"))),
        *({"dropout": share} for share in (-0.1, 1.0, float("nan"))),
        *({"weight_decay": -0.1}, {"seed": -1}, {"clip": 0.0}),
    ],
    ids=str,
)
def test_settings_that_only_fail_later_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be"):
        TrainConfig(**changes)
