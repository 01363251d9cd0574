"""The script for a GPU, run with tiny sizes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "loadtest" / "bench" / "gpu.sh"


def run(out: Path, python: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script with `out` as its folder."""
    environment = {**os.environ, "DRY_RUN": "1", "PYTHON": str(python), **variables}
    return subprocess.run(
        ["bash", SCRIPT, out], env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.mark.slow
def test_a_dry_run_measures_and_sums_up(tmp_path: Path) -> None:
    ran = run(tmp_path / "gpu", sys.executable)
    summary = (tmp_path / "gpu" / "summary.txt").read_text()
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.endswith(summary) and summary.endswith("nothing failed\n")
    report = json.loads((tmp_path / "gpu" / "bench.json").read_text())
    names = ["fixed-cache-float16", "transformers", "transformers-bfloat16"]
    (result,) = report["results"]
    assert [(e["name"], e["outcome"]) for e in result["entries"]] == [(n, "ok") for n in names]
    for name in names:
        assert f"{name}: " in summary
    assert "tokens/s a stream" in summary
    assert "skipped" in summary, "the tests for a GPU are not even collected"


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    """With a Python that has nothing, each part fails by itself."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nunset PYTHONPATH\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    ran = run(tmp_path / "gpu", bare)
    assert ran.returncode == 1
    assert [line for line in ran.stdout.splitlines() if line.startswith("FAILED")] == [
        f"FAILED {name}: exit code 1, see {tmp_path}/gpu/{name}.log"
        for name in ("versions", "tests", "bench", "contestants")
    ]
    assert "torch: No module named 'torch'" in ran.stdout
    assert "there is no report of the bench" in ran.stdout


def test_all_parts_together_take_at_most_eight_minutes() -> None:
    limits = [
        int(line.split()[2])
        for line in SCRIPT.read_text().splitlines()
        if line.lstrip().startswith("part ")
    ]
    assert len(limits) == 5
    until_killed = 5
    assert sum(limit + until_killed for limit in limits) <= 8 * 60
