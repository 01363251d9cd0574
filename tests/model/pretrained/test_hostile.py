"""Hostile models are refused by name, within seconds and in little memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model.pretrained import convert as convert_module
from model.pretrained.convert import convert
from model.pretrained.files import find_file
from model.pretrained.source import PretrainedError
from model.run import CHECKPOINT
from tests.model.pretrained.folders import write
from tests.model.pretrained.hostile import HOSTILE

ROOT = Path(__file__).parents[3]
_MOST_S, _MOST_BYTES = 10.0, 400 << 20

_CONVERT_ALL = """
import json, resource, sys, time
from pathlib import Path
import model.data, tokenizers
from model.pretrained.convert import convert
from model.pretrained.source import PretrainedError
from tests.model.pretrained.hostile import HOSTILE

def peak():
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024

def told(make, folder):
    source = make(folder / "tiny")
    began, before = time.process_time(), peak()
    try:
        convert(source, folder / "run")
        said = "it is converted"
    except PretrainedError as error:
        said = str(error)
    took = time.process_time() - began
    return said, took, peak() - before, sorted(path.name for path in folder.iterdir())

for name, (make, _) in HOSTILE.items():
    folder = Path(sys.argv[1]) / name.replace(" ", "-")
    folder.mkdir()
    print(json.dumps([name, *told(make, folder)]), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is said of every hostile model, in one process of its own; CPU seconds; memory."""
    ran = subprocess.run(
        [sys.executable, "-c", _CONVERT_ALL, str(tmp_path_factory.mktemp("hostile"))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "protos")])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return {name: told for name, *told in map(json.loads, ran.stdout.splitlines())}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_model_is_refused_soon_and_in_little_memory(
    name: str, outcomes: dict[str, Any]
) -> None:
    said, took, grown, left = outcomes[name]
    assert re.search(HOSTILE[name][1], said), said
    assert len(said) < 1000
    assert took < _MOST_S and grown < _MOST_BYTES, (took, grown)
    assert all(path.startswith("tiny") for path in left)  # nothing half made


def test_a_model_larger_than_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module, "memory_bytes", lambda: 1000)
    with pytest.raises(PretrainedError, match=r"has 4,272 weights, and 0 GB of memory are too"):
        convert(write(tmp_path / "tiny"), tmp_path / "run")


def test_a_pickled_file_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(PretrainedError, match="pickled weights, which can run code: save the mod"):
        convert(tmp_path / "model.bin", tmp_path / "run")


def test_links_within_a_hub_s_cache_are_followed_and_no_others(tmp_path: Path) -> None:
    """A hub keeps files in `blobs`, and a folder of links for each version of a model."""
    blobs, version = tmp_path / "them" / "blobs", tmp_path / "them" / "snapshots" / "1a2b"
    blobs.mkdir(parents=True), version.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        write(tmp_path / name.partition(".")[0]).joinpath(name).rename(blobs / name)
        (version / name).symlink_to(f"../../blobs/{name}")
    convert(version, tmp_path / "run")
    assert (tmp_path / "run" / CHECKPOINT).exists()
    (tmp_path / "secret").write_text("{}")
    (version / "tokenizer.json").symlink_to("../../../secret")
    with pytest.raises(PretrainedError, match=r"tokenizer\.json is a link that leads out"):
        convert(version, tmp_path / "other")
    plain = tmp_path / "plain"
    plain.mkdir(), (plain / "a").symlink_to("b"), (plain / "b").write_text("x")
    assert find_file(plain, "a") == plain / "a"
    assert find_file(plain, "c") is None
