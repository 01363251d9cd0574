"""What is installed, and what is not: names, versions, no torch where we serve, a slim client."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import concertina
from tests.e2e.servers import serving

ROOT = Path(__file__).parents[1]
PROTOS = ROOT / "protos"
SERVER: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLIENT: dict[str, Any] = tomllib.loads((PROTOS / "pyproject.toml").read_text())["project"]
OURS = {"concertina": SERVER, "concertina-client": CLIENT}
STUBS = PROTOS / "concertina" / "v1"
# What the bench compares with, which is not installed here.
PEERS = {"gguf", "llama_cpp", "onnxruntime_genai", "tokenizers", "transformers", "vllm"}
TRAINING = {"torch", "onnx", "onnxscript", "safetensors", "fonttools"}


def declared(project: dict[str, Any], *extras: str) -> list[Requirement]:
    """What a project names itself."""
    lists = [project["dependencies"], *(project["optional-dependencies"][each] for each in extras)]
    return [Requirement(line) for each in lists for line in each]


def requirements(project: dict[str, Any], *extras: str) -> list[Requirement]:
    """What a project needs from others: for one of ours, what that one needs in its place."""
    return [
        needed
        for each in declared(project, *extras)
        for needed in (requirements(OURS[each.name], *each.extras) if each.name in OURS else [each])
    ]


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


@pytest.mark.parametrize(
    ("name", "distribution"),
    [
        ("server", "concertina"),
        ("model", "concertina"),
        ("export", "concertina"),
        ("loadtest", "concertina"),
        ("concertina", "concertina-client"),
    ],
)
def test_no_dependency_ships_a_package_of_our_name(name: str, distribution: str) -> None:
    assert set(metadata.packages_distributions().get(name, [])) <= {distribution}


def test_serving_needs_no_training_package() -> None:
    everything = closure(requirements(SERVER, "cpu"))
    assert {"grpcio", "numpy", "onnxruntime", "ray", "starlette"} <= everything
    assert not everything & TRAINING


def test_gpu_serving_asks_for_no_training_package() -> None:
    assert not {each.name for each in requirements(SERVER, "gpu")} & TRAINING


@pytest.mark.parametrize(
    ("folders", "project", "extras"),
    [
        (["protos/concertina/client", "protos/concertina/v1"], CLIENT, []),
        (["protos/concertina/bundle", "protos/concertina/codecs"], CLIENT, ["codecs"]),
        (["protos/concertina"], CLIENT, ["cli", "codecs"]),
        (["server", "loadtest"], SERVER, ["cpu", "hub"]),
        (["model", "export", "loadtest/bench"], SERVER, ["cpu", "train"]),
        (["loadtest/scenarios"], SERVER, ["cpu", "dev"]),
        (["tests", "tools"], SERVER, ["cpu", "train", "dev"]),
    ],
)
def test_every_import_is_of_a_declared_requirement(
    folders: list[str], project: dict[str, Any], extras: list[str]
) -> None:
    known = {canonicalize_name(each.name) for each in declared(project, *extras)}
    distributions = metadata.packages_distributions()
    found = [each for folder in folders for each in third_party(ROOT / folder)]
    # The programs run where `make clients` installs what they import.
    rooms = ("loadtest/bench", "loadtest/scenarios", "tests/clients/programs")
    apart = [ROOT / each for each in rooms if each not in folders]
    imported = {
        name: path
        for name, path in found
        if name not in PEERS and not any(each in path.parents for each in apart)
    }
    assert imported
    for name, path in imported.items():
        assert {canonicalize_name(each) for each in distributions.get(name, [])} & known, (
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
    extras = [extra for extra in SERVER["optional-dependencies"] if extra != "gpu"]
    for each in requirements(SERVER, *extras):
        assert each.specifier.contains(pinned[canonicalize_name(each.name)]), each


def test_client_and_server_are_of_one_version() -> None:
    version = concertina.__version__
    assert SERVER["version"] == version
    assert str(pins()["concertina-client"]) == version
    (client,) = (each for each in declared(SERVER) if each.name == "concertina-client")
    assert str(client.specifier) == f"=={version}"
    assert client.extras == {"cli", "codecs"}


def test_constraints_are_plain_versions() -> None:
    for name, version in pins().items():
        assert version.local is None and re.fullmatch(r"[a-z0-9-]+", name), f"{name}=={version}"


@pytest.mark.parametrize("project", [SERVER, CLIENT], ids=["server", "client"])
def test_lower_bounds_are_what_the_stubs_demand(project: dict[str, Any]) -> None:
    bounds = {each.name: each.specifier for each in declared(project)}
    for stub in sorted(STUBS.glob("*_pb2.py")):
        found = re.search(r"Protobuf Python Version: (\S+)", stub.read_text())
        assert found and str(bounds["protobuf"]) == f">={found[1]}", stub
    for stub in sorted(STUBS.glob("*_pb2_grpc.py")):
        found = re.search(r"GRPC_GENERATED_VERSION = '(\S+)'", stub.read_text())
        assert found and str(bounds["grpcio"]) == f">={found[1]}", stub


def build_wheel(source: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.parametrize(
    ("source", "packages"),
    [(ROOT, {"export", "loadtest", "model", "server"}), (PROTOS, {"concertina"})],
    ids=["server", "client"],
)
def test_a_wheel_holds_our_packages_and_nothing_else(
    source: Path, packages: set[str], tmp_path: Path
) -> None:
    with zipfile.ZipFile(build_wheel(source, tmp_path)) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in files} == packages
    assert not [name for name in files if "test_" in name or name.endswith((".onnx", ".npy"))]
    if source == PROTOS:
        stubs = {f"concertina/v1/{path.name}" for path in STUBS.glob("*_pb2.pyi")}
        assert stubs and {"concertina/py.typed", "concertina/cli/main.py", *stubs} <= files


STREAM = """
import asyncio, sys
from concertina.client import AsyncClient, Client, Finished, Tokens

asked = {"prompt": "An abacus", "max_tokens": 20, "seed": 3}

async def read():
    async with AsyncClient(sys.argv[1]) as client, client.generate(**asked) as stream:
        return [event async for event in stream]

with Client(sys.argv[1]) as client, client.generate(**asked) as stream:
    events = list(stream)
for each in (events, asyncio.run(read())):
    assert isinstance(each[-1], Finished), each[-1]
    print(repr("".join(event.text for event in each if isinstance(event, Tokens))))
"""


@pytest.mark.slow
@pytest.mark.e2e
def test_the_client_streams_where_nothing_else_is_installed(
    text_bundle: Path, tmp_path: Path
) -> None:
    wheel = build_wheel(PROTOS, tmp_path)
    venv = tmp_path / "venv"
    python = venv / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=120)
    install = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    install += ["install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel]
    subprocess.run(install, check=True, timeout=240)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        ran = subprocess.run(
            [str(each) for each in command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ran.returncode == code, ran.stderr
        return ran

    names = "from importlib import metadata; print(*(d.name for d in metadata.distributions()))"
    installed = {canonicalize_name(name) for name in run(python, "-c", names).stdout.split()}
    assert installed == {"concertina-client", "grpcio", "protobuf", "typing-extensions"}

    with serving("--local", str(text_bundle)) as server:
        blocking, asynchronous = run(python, "-c", STREAM, server.address).stdout.splitlines()
    assert blocking == asynchronous
    assert len(blocking) > 20

    refused = run(venv / "bin" / "concertina", "--version", code=1)
    assert refused.stderr.startswith("error: the command concertina needs the 'cli' extra (")
    assert refused.stderr.count("\n") == 1
