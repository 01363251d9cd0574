"""The memory of a run is estimated before it starts, and compared with what there is."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest

from concertina.cli.main import main
from model.config import ROWS, Attention, ModelConfig
from model.data import save_dataset
from model.memory import available, check_memory, estimate
from model.run import RunError, TrainConfig
from tests.model.test_stopping import ARGUMENTS, text

MODEL = ModelConfig(256, context=512, width=128, layers=2, heads=4, mlp=256, span=32)
RUN = TrainConfig(rows=8)
_MEASURE = """
import resource, sys, torch
from pathlib import Path
import numpy as np
from model.config import ModelConfig
from model.data import Dataset, DatasetInfo
from model.memory import estimate
from model.run import TrainConfig
from model.train import train

torch.set_num_threads(1)
run = np.random.default_rng(0).integers(256, size=6000).astype(np.uint8)
data = Dataset(DatasetInfo("text", 256, "random", "CC0-1.0"), run, run)
model = ModelConfig(256, context=1024, width=128, layers=4, heads=4, mlp=512, span=32)
config = TrainConfig(tokens=3 * 16 * 1024, rows=16)
found = estimate(model, config).total
pages = int(Path("/proc/self/statm").read_text().split()[1])
train(Path(sys.argv[1]), model, config, data)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(found / (peak - pages * resource.getpagesize()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_estimate_is_near_what_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert 0.6 < float(done.stdout) < 1.6


@pytest.mark.parametrize("attention", get_args(Attention))
def test_every_pattern_has_an_estimate(attention: Any) -> None:
    span = 32 if attention in ROWS else 16
    model = replace(MODEL, context=128, attention=attention, span=span)
    found = estimate(model, RUN)
    # Ten vectors of the width, in bfloat16, are kept for a token and layer at the very least.
    assert found.row > 10 * 128 * 128 * 2 * 2
    assert found.fixed >= 16 * 2 * (4 * 128 * 128 + 2 * 128 * 256)


def test_windows_count_each_and_types_count() -> None:
    one, eight = (estimate(MODEL, replace(RUN, rows=rows)) for rows in (1, 8))
    assert (one.fixed, one.row) == (eight.fixed, eight.row)
    assert eight.total == eight.fixed + 8 * eight.row
    assert one.total == one.fixed + one.evaluation  # evaluations read eight windows at once
    float32 = estimate(MODEL, replace(RUN, bfloat16=False))
    assert 1.2 * eight.row < float32.row < 2.1 * eight.row
    deeper = estimate(replace(MODEL, layers=4), RUN)
    assert 1.7 * eight.row < deeper.row < 2.1 * eight.row


def test_a_run_that_does_not_fit_is_refused_with_what_would() -> None:
    found = estimate(MODEL, RUN)
    assert check_memory(MODEL, RUN, found.total) == found
    with pytest.raises(RunError, match=r"needs about .* GB of memory .*: use --rows 7, or --force"):
        check_memory(MODEL, RUN, found.total - 1)
    assert check_memory(MODEL, replace(RUN, rows=7), found.total - 1)
    with pytest.raises(RunError, match="use a shorter --context or a smaller --width, or --force"):
        check_memory(MODEL, RUN, found.fixed)


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def limits_v2(root: Path) -> None:
    write(root / "proc/self", cgroup="0::/jobs/one")
    group = root / "sys/fs/cgroup/jobs"
    write(group / "one", memory__max="max", memory__current=4000, memory__stat="inactive_file 0")
    write(group, memory__max=9000, memory__current=5000, memory__stat="anon 1\ninactive_file 700")


def limits_v1(root: Path) -> None:
    write(root / "proc/self", cgroup="9:name=systemd:/\n4:memory:/jobs/one\n0::/")
    group = root / "sys/fs/cgroup/memory/jobs/one"
    write(group, memory__limit_in_bytes=9000, memory__usage_in_bytes=5000)
    write(group, memory__stat="cache 900\ntotal_inactive_file 700")


def limits_in_a_container(root: Path) -> None:
    write(root / "proc/self", cgroup="0::/../../host/path")
    group = root / "sys/fs/cgroup"
    write(group, memory__max=9000, memory__current=5000, memory__stat="inactive_file 700")


@pytest.mark.parametrize("limit", [limits_v1, limits_v2, limits_in_a_container])
def test_limits_of_control_groups_count(limit: Any, tmp_path: Path) -> None:
    limit(tmp_path)
    assert available(tmp_path) == 9000 - 5000 + 700


def test_without_a_limit_the_machine_is_what_there_is(tmp_path: Path) -> None:
    assert available(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.3)


@pytest.mark.parametrize("force", [False, True])
def test_the_command_refuses_unless_forced(
    force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_dataset(tmp_path / "data", text())
    out = tmp_path / "run"
    monkeypatch.setattr("model.memory.available", lambda: 10_000)
    arguments = [str(tmp_path / "data"), str(out), *ARGUMENTS, "--tokens", "64"]
    monkeypatch.setattr(sys, "argv", ["concertina", "train", *arguments, *["--force"] * force])
    with pytest.raises(SystemExit) as exit:
        main()
    said = " ".join(capsys.readouterr().err.split())
    assert exit.value.code == (0 if force else 1), said
    assert ("training needs about 0.00 GB" in said) is not force
    assert out.exists() is force
