"""Audit what we depend on: `audit.py PYPROJECT CONSTRAINTS` ends with status 1 if it finds a fault.

Whatever pyproject.toml asks for, at any remove, has to be pinned to one version in constraints.txt,
and that one has to be installed: so what was audited is what runs. The pinned versions are then
held against known vulnerabilities, where their data can be reached.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("cpu", "train", "dev")  # what `make lint` and `make test` install
_PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;,*]+)")
_INSTALLER = "pip"  # comes with the virtual environment
_DATA = "https://pypi.org/pypi/pip/25.0/json"  # of one version, as pip-audit asks
_PROBE_SECONDS = 4.0
_AUDIT_SECONDS = 120.0


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


def knows_vulnerabilities() -> bool:
    """Whether the data of pip-audit can be reached from here."""
    try:
        with urllib.request.urlopen(_DATA, timeout=_PROBE_SECONDS) as page:
            return "vulnerabilities" in json.load(page)
    except (OSError, ValueError):
        return False


def main(pyproject: Path, constraints: Path) -> int:
    project = tomllib.loads(pyproject.read_text())["project"]
    pinned = pins(constraints.read_text())
    found = sorted(set(faults(required(project, EXTRAS), pinned)))
    for fault in found:
        print(f"{constraints}: {fault}")
    if found:
        return 1
    if not knows_vulnerabilities():
        print(f"{len(pinned)} pins hold; known vulnerabilities cannot be reached from here")
        return 0
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off"]
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(constraints), *options]
    return subprocess.run(command, timeout=_AUDIT_SECONDS).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
