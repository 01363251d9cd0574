"""What is installed, and what is not: names, versions, and no torch where we serve."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
STUBS = ROOT / "protos" / "concertina" / "v1"
# What the bench compares with, which is not installed here.
PEERS = {"gguf", "llama_cpp", "onnxruntime_genai", "tokenizers", "transformers"}
TRAINING = {"torch", "onnx", "onnxscript", "safetensors", "fonttools"}


def requirements(*extras: str) -> list[Requirement]:
    lists = [PROJECT["dependencies"], *(EXTRAS[extra] for extra in extras)]
    return [Requirement(line) for each in lists for line in each]


def closure(roots: list[Requirement]) -> set[str]:
    """Names of everything that `roots` bring along, by what is installed here."""
    found: set[tuple[str, str]] = set()
    waiting = [(each.name, extra) for each in roots for extra in {"", *each.extras}]
    while waiting:
        name, extra = waiting.pop()
        if (key := (canonicalize_name(name), extra)) in found:
            continue
        found.add(key)
        for line in metadata.requires(name) or []:
            each = Requirement(line)
            if each.marker is None or each.marker.evaluate({"extra": extra}):
                waiting += [(each.name, inner) for inner in {"", *each.extras}]
    return {name for name, _ in found}


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("name", ["server", "model", "export", "loadtest", "concertina"])
def test_no_dependency_ships_a_package_of_our_name(name: str) -> None:
    assert set(metadata.packages_distributions().get(name, [])) <= {"concertina"}


def test_serving_needs_no_training_package() -> None:
    everything = closure(requirements("cpu"))
    assert {"grpcio", "numpy", "onnxruntime", "ray", "starlette"} <= everything
    assert not everything & TRAINING


def test_gpu_serving_asks_for_no_training_package() -> None:
    assert not {each.name for each in requirements("gpu")} & TRAINING


@pytest.mark.parametrize(
    ("folders", "extras"),
    [
        (["server", "loadtest", "protos/concertina"], ["cpu"]),
        (["model", "export", "loadtest/bench"], ["cpu", "train"]),
        (["tests", "tools"], ["cpu", "train", "dev"]),
    ],
)
def test_every_import_is_of_a_declared_requirement(folders: list[str], extras: list[str]) -> None:
    declared = {canonicalize_name(each.name) for each in requirements(*extras)}
    distributions = metadata.packages_distributions()
    found = [each for folder in folders for each in third_party(ROOT / folder)]
    bench = ROOT / "loadtest" / "bench"
    imported = {
        name: path
        for name, path in found
        if name not in PEERS and (bench not in path.parents or "loadtest/bench" in folders)
    }
    assert imported
    for name, path in imported.items():
        assert {canonicalize_name(each) for each in distributions.get(name, [])} & declared, (
            name,
            path,
        )


def third_party(folder: Path) -> Iterator[tuple[str, Path]]:
    """Top-level modules that are imported below `folder` and are neither ours nor Python's."""
    ours = {"server", "model", "export", "loadtest", "concertina", "tests", "tools"}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in (each.split(".")[0] for each in names):
                if name not in ours | sys.stdlib_module_names:
                    yield name, path


IMPORT_ALL = """
import importlib, pathlib, sys
for name in {forbidden!r}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
for folder in ("server", "loadtest", "protos/concertina"):
    for path in sorted(pathlib.Path(folder).rglob("*.py")):
        if path.match("loadtest/bench/*.py") or path.match("loadtest/bench/adapters/*.py"):
            continue  # the bench makes models, which takes torch
        parts = path.with_suffix("").parts
        importlib.import_module(".".join(parts[parts[0] == "protos":]).removesuffix(".__init__"))
        print(path)
"""


def test_all_that_serves_can_be_imported_without_training_packages() -> None:
    forbidden = ["torch", "onnx", "onnxscript", "safetensors", "fontTools", "model", "export"]
    code = IMPORT_ALL.format(forbidden=forbidden)
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = ['protos', '.']{code}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "server/runtime/onnx_session.py" in ran.stdout.splitlines()


def test_every_requirement_is_pinned_by_a_version_it_allows() -> None:
    pinned = pins()
    for each in requirements(*(extra for extra in EXTRAS if extra != "gpu")):
        assert each.specifier.contains(pinned[canonicalize_name(each.name)]), each


def test_constraints_are_plain_versions() -> None:
    for name, version in pins().items():
        assert version.local is None and re.fullmatch(r"[a-z0-9-]+", name), f"{name}=={version}"


def test_lower_bounds_are_what_the_stubs_demand() -> None:
    bounds = {each.name: each.specifier for each in requirements()}
    for stub in sorted(STUBS.glob("*_pb2.py")):
        found = re.search(r"Protobuf Python Version: (\S+)", stub.read_text())
        assert found and str(bounds["protobuf"]) == f">={found[1]}", stub
    for stub in sorted(STUBS.glob("*_pb2_grpc.py")):
        found = re.search(r"GRPC_GENERATED_VERSION = '(\S+)'", stub.read_text())
        assert found and str(bounds["grpcio"]) == f">={found[1]}", stub


def test_the_wheel_holds_our_packages_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in files} == {
        "concertina",
        "export",
        "loadtest",
        "model",
        "server",
    }
    assert {"concertina/cli/main.py", "concertina/v1/generation_service_pb2.pyi"} <= files
    assert not [name for name in files if "test_" in name or name.endswith((".onnx", ".npy"))]
