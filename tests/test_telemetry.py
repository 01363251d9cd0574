"""Nothing that we run reports to anyone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("server", "model", "export", "loadtest", "protos/concertina", "tools")
OPEN = """
import sys
from importlib import import_module
import_module(sys.argv[1])
import onnxruntime
onnxruntime.InferenceSession(sys.argv[2])
"""


def _doors() -> list[str]:
    """The modules of ours that import onnxruntime."""
    doors = []
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for line in ast.parse(path.read_text()).body:
                names = [alias.name for alias in line.names] if isinstance(line, ast.Import) else []
                if isinstance(line, ast.ImportFrom):
                    names = [line.module or ""]
                if any(name.split(".")[0] == "onnxruntime" for name in names):
                    doors.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return sorted(doors)


def test_the_doors_are_known() -> None:
    assert len(_doors()) == 5


@pytest.mark.parametrize("door", ["nothing", *_doors()])
def test_onnxruntime_writes_nothing_home(door: str, tmp_path: Path) -> None:
    """Without us, it would: a release that has another variable for it is noticed here."""
    if door.endswith(".genai"):
        pytest.importorskip("onnxruntime_genai")
    # It keeps quiet on a machine whose variables say that it tests (CI, GITHUB_ACTIONS and others).
    environment = {"HOME": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}
    graph = str(ROOT / "bundles/python-4k/fold.onnx")
    module = "json" if door == "nothing" else door
    subprocess.run([sys.executable, "-c", OPEN, module, graph], env=environment, check=True)
    assert (tmp_path / ".cache" / "Microsoft").exists() is (door == "nothing")
