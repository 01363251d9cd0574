"""What is pinned is what is installed, and so what `make audit` checks is what runs."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
EXTRAS = ("cpu", "train", "dev")  # what `make lint` and `make test` install
_PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;,*]+)")
_INSTALLER = "pip"  # comes with the virtual environment


def test_what_is_required_is_pinned_and_the_pinned_version_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = pins((ROOT / "constraints.txt").read_text())
    assert sorted(set(faults(required(project, EXTRAS), pinned))) == []


def test_only_exact_pins_pass() -> None:
    assert pins("# why\nFoo_bar==1.0\n\nbaz==2.0.post1\n") == {
        "foo-bar": "1.0",
        "baz": "2.0.post1",
    }
    for line in ("foo", "foo>=1", "foo==1.*", "foo==1,!=2", "-e .", "foo @ https://example.com"):
        with pytest.raises(ValueError, match="does not pin one version"):
            pins(line)


def test_what_is_not_pinned_is_found_however_deep() -> None:
    own = version("pytest")
    assert list(faults(["no-such-package>1; python_version < '3'"], {})) == []
    assert list(faults(["no-such-package"], {})) == ["no-such-package is not installed here"]
    found = list(faults(["pytest"], {"pytest": own}))
    assert any(fault.startswith("pluggy ") and "not pinned" in fault for fault in found)
    assert not any(fault.startswith("pytest ") for fault in found)
    (fault,) = faults(["iniconfig"], {"iniconfig": "0.1"})
    assert fault == f"iniconfig is pinned to 0.1, and {version('iniconfig')} is installed"


def test_extras_are_followed() -> None:
    plain, extra = (list(faults([each], {})) for each in ("ray", "ray[serve]"))
    assert not any(fault.startswith("uvicorn ") for fault in plain)
    assert any(fault.startswith("uvicorn ") for fault in extra)


@pytest.mark.parametrize(
    ("reachable", "verdict", "code"), [(False, 1, 0), (True, 0, 0), (True, 1, 2)]
)
def test_the_audit_is_pip_audits_verdict_where_its_data_can_be_reached(
    reachable: bool, verdict: int, code: int, tmp_path: Path
) -> None:
    scripts = {
        "python": f'case "$*" in *urlopen*) exit {int(not reachable)};; esac; echo "pip: $*"',
        "pip-audit": f'echo "audited: $*"; exit {verdict}',
    }
    (tmp_path / "bin").mkdir()
    for name, script in scripts.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".dev").touch()  # newer than what it is made of, so nothing is installed
    command = ["make", "--no-print-directory", "audit", f"VENV={tmp_path}"]
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == code, ran.stderr
    assert re.search("^pip: -m pip .* check$", ran.stdout, re.M)
    assert bool(re.search("^audited: .*constraints.txt", ran.stdout, re.M)) is reachable
    assert ("cannot be reached" in ran.stdout) is not reachable


def pins(constraints: str) -> dict[str, str]:
    """Version of each package. Raises ValueError for a line that pins none."""
    found: dict[str, str] = {}
    for line in constraints.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        pin = _PIN.fullmatch(line.strip())
        if pin is None:
            raise ValueError(f"{line!r} does not pin one version: write NAME==VERSION")
        found[canonicalize_name(pin[1])] = pin[2]
    return found


def required(project: dict[str, object], extras: Iterable[str]) -> Iterator[str]:
    """Requirements of a `[project]` table and of some of its extras."""
    yield from project["dependencies"]  # type: ignore[misc]
    for extra in extras:
        yield from project["optional-dependencies"][extra]  # type: ignore[index]


def faults(requirements: Iterable[str], pinned: dict[str, str]) -> Iterator[str]:
    """What is not pinned, not installed or installed otherwise, of these and all that they need."""
    seen = set[tuple[str, str]]()
    todo = [(Requirement(each), "") for each in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        wanted = [(name, each) for each in ("", *requirement.extras)]
        new = [each for each in wanted if each not in seen]
        if not new or name == _INSTALLER:
            continue
        first = name not in {known for known, _ in seen}
        seen.update(new)
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            yield f"{name} is not installed here"
            continue
        if first and (fault := _fault(name, installed, pinned)):
            yield fault
        needs = [Requirement(each) for each in installed.requires or ()]
        todo += [(need, each) for need in needs for _, each in new]


def _fault(name: str, installed: Distribution, pinned: dict[str, str]) -> str | None:
    version = installed.version.partition("+")[0]  # a build for one kind of machine
    if name not in pinned:
        return f"{name} {version} is installed and not pinned"
    if version != pinned[name]:
        return f"{name} is pinned to {pinned[name]}, and {version} is installed"
    return None
