"""Install clients of OpenAI's API, each into an environment of its own: `install_clients [NAME…]`.

tools/clients.toml names them and their versions; without names, all are installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

VERSIONS: Final = Path(__file__).with_name("clients.toml")
INSTALLED: Final = Path(__file__).parents[1] / "build" / "clients"
_PIP: Final = ("-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "install", "--quiet")
_NPM: Final = ("npm", "install", "--silent", "--no-audit", "--no-fund")


def versions() -> Mapping[str, Mapping[str, Sequence[str]]]:
    """What each client is made of, by its installer and its name."""
    found: Mapping[str, Mapping[str, Sequence[str]]] = tomllib.loads(VERSIONS.read_text())
    return found


def what_is_missing(name: str) -> str:
    """Why the client cannot be run here; empty if it can."""
    wanted = next(kind[name] for kind in versions().values() if name in kind)
    mark = _mark(name)
    if not mark.exists():
        return f"{name} is not installed: make clients CLIENTS={name}"
    if mark.read_text().split() != list(wanted):
        return f"another version of {name} is installed: make clients CLIENTS={name}"
    return ""


def main(names: Sequence[str]) -> None:
    """Install these, or all. Raises SystemExit for a name that is not there, or if one fails."""
    known = {name: installer for installer, kind in versions().items() for name in kind}
    for name in names or known:
        if name not in known:
            raise SystemExit(f"no client is called {name!r}: choose from {', '.join(known)}")
        if what_is_missing(name):
            print(f"Installing {name} into {INSTALLED / name}.", flush=True)
            _install(name, known[name], versions()[known[name]][name])


def _install(name: str, installer: str, wanted: Sequence[str]) -> None:
    folder = INSTALLED / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if installer == "npm":
        commands = [[*_NPM, "--prefix", str(folder), *wanted]]
    else:
        python = folder / "bin" / "python"
        commands = [[sys.executable, "-m", "venv", str(folder)], [str(python), *_PIP, *wanted]]
    for command in commands:
        if subprocess.run(command).returncode:
            raise SystemExit(f"{name} cannot be installed: {' '.join(command)} fails, see above")
    _mark(name).write_text("\n".join(wanted) + "\n")


def _mark(name: str) -> Path:
    """The file that says what is installed."""
    return INSTALLED / f"{name}.installed"


if __name__ == "__main__":
    main(sys.argv[1:])
