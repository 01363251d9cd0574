"""Clients that `make clients` has installed, run as their users run them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools.install_clients import INSTALLED, what_is_missing

PROGRAMS = Path(__file__).parent / "programs"
WAIT = 600.0
# Nothing may be fetched, and nobody told: what a client needs is here, or it fails.
OFFLINE = {
    "DO_NOT_TRACK": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Environment:
    """A client in an environment of its own. home: an empty folder, in which it runs."""

    folder: Path
    home: Path

    def run(self, *command: str | Path, **environment: str) -> str:
        """What a program of the environment prints. It has to end well."""
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        given = {"PATH": path, "HOME": str(self.home), "LANG": "C.UTF-8", "COLUMNS": "200"}
        ran = subprocess.run(
            list(map(str, command)),
            cwd=self.home,
            env={**given, **OFFLINE, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WAIT,
        )
        assert ran.returncode == 0, (command, ran.stdout[-6000:], ran.stderr[-6000:])
        return ran.stdout

    def python(self, program: str, *arguments: str | Path, **environment: str) -> str:
        """What one of `programs` prints."""
        return self.run("python", PROGRAMS / program, *arguments, **environment)


def environment(name: str, home: Path) -> Environment:
    """The environment of a client. Skips the test if the client is not installed."""
    if missing := what_is_missing(name):
        pytest.skip(missing)
    return Environment(INSTALLED / name, home)


def url(http_address: str) -> Mapping[str, str]:
    """How programs find the server."""
    return {"BASE_URL": f"http://{http_address}/v1"}
