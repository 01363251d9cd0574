"""Dashboards and rules: they are what is generated, read metrics that exist, and fire when due."""

from __future__ import annotations

import json
import subprocess
from itertools import combinations
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

import server.ops.metrics  # noqa: F401
from tests.prometheus import DASHBOARDS, RULES, names, panels, program, rules
from tools.write_dashboards import main, written

FOLDER = Path(__file__).parent


def test_the_dashboards_are_those_that_are_generated() -> None:
    assert main(check=True) == 0, "run make dashboards"
    assert [path for path, _ in sorted(written())] == DASHBOARDS and len(DASHBOARDS) == 3


def exposed() -> set[str]:
    """The names of all samples of the server, with those of histograms that nobody has filled."""
    found = {sample.name for family in REGISTRY.collect() for sample in family.samples}
    for family in REGISTRY.collect():
        ends = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "gauge": ("",)}
        found |= {family.name + end for end in ends.get(family.type, ())}
    return found


def test_every_expression_reads_metrics_that_there_are() -> None:
    known = exposed() | {rule["record"] for rule in rules() if "record" in rule}
    read = [names(expression) for _, expression in panels()]
    read += [names(rule["expr"]) for rule in rules()]
    assert len(read) > 60 and all(read)
    assert {name for each in read for name in each} - known == set()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_lie_side_by_side(path: Path) -> None:
    board = json.loads(path.read_text())
    places = [panel["gridPos"] for panel in board["panels"]]
    for a, b in combinations(places, 2):
        apart_x = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart_x or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    assert len({panel["id"] for panel in board["panels"]}) == len(places)
    assert {each["name"] for each in board["templating"]["list"]} == {"datasource", "model"}
    for panel in board["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["legendFormat"] for target in panel["targets"])


def test_every_alert_says_what_to_do() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) >= 8
    for alert in alerts:
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert alert["annotations"]["summary"] and alert["annotations"]["description"]


def test_alerts_fire_when_they_are_due_and_not_before() -> None:
    test = FOLDER / "rules_test.yaml"
    tried = {rule["alert"] for rule in rules() if "alert" in rule}
    assert {name for name in tried if name not in test.read_text()} == set()
    for command in (["check", "rules", *map(str, RULES)], ["test", "rules", str(test)]):
        ran = subprocess.run(
            [program("promtool"), *command], capture_output=True, text=True, timeout=60
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
