"""Prometheus' programs, where there are some, and the expressions of ours that they try."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CHART = ROOT / "helm" / "concertina"
RULES = sorted((CHART / "rules").glob("*.yaml"))
DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))
UNPACKED = ROOT / "build" / "prometheus" / "usr" / "bin"


def program(name: str) -> str:
    """Where `promtool` or `prometheus` is. Skips the test where there is none."""
    found = shutil.which(name) or shutil.which(name, path=str(UNPACKED))
    if found is None:
        pytest.skip(f"no {name}: install Debian's prometheus, or unpack it into build/prometheus")
    return found


def panels() -> Iterator[tuple[str, str]]:
    """Where each expression of a dashboard stands, and the expression."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{path.stem}: {panel['title']} {target['refId']}", target["expr"]


def rules() -> Iterator[dict[str, Any]]:
    """The rules of all groups."""
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


def selectors(expression: str) -> set[str]:
    """The metrics that an expression reads, with the labels that it asks for."""
    return set(re.findall(r"\bconcertina[\w:]*(?:\{[^}]*\})?", expression))


def names(expression: str) -> set[str]:
    """The names of the metrics that an expression reads."""
    return {each.partition("{")[0] for each in selectors(expression)}
