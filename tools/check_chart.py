"""Lint a chart, render it with each of its values files, and check every object by its schema.

`check_chart.py HELM CHART` prints the faults, and ends with status 1 when there are any.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import yaml

# The oldest that Chart.yaml allows, and the newest there is a schema for.
KUBERNETES = ("1.27.0", kubernetes_validate.latest_version())
WITHOUT_SCHEMA = {"PodMonitor", "PrometheusRule"}  # of an operator, not of Kubernetes


def run(command: list[str]) -> str:
    """Standard output of `command`; raises RuntimeError with all its output when it fails."""
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{ran.stdout}{ran.stderr}")
    return ran.stdout


def faults(helm: str, chart: Path, values: Path) -> list[str]:
    """What is wrong with `chart` under `values`, by helm or by the schemas of its objects."""
    what = [str(chart), "--values", str(values)]
    try:
        run([helm, "lint", "--strict", "--quiet", *what])
        rendered = run([helm, "template", "test", "--kube-version", KUBERNETES[0], *what])
    except RuntimeError as error:
        return [str(error)]
    return [fault for each in yaml.safe_load_all(rendered) if each for fault in schema_faults(each)]


def schema_faults(thing: dict[str, str]) -> list[str]:
    """Where `thing` departs from the schemas of the oldest and the newest Kubernetes."""
    if thing["kind"] in WITHOUT_SCHEMA:
        return []
    found = []
    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(thing, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(map(str, error.path))
            found.append(f"{thing['kind']} {path}: {error.message} (Kubernetes {version})")
        except kubernetes_validate.SchemaNotFoundError as error:
            found.append(f"{error.kind} {error.api_version}: unknown to Kubernetes {version}")
    return found


def main(helm: str, chart: Path) -> int:
    status = 0
    for values in [chart / "values.yaml", *sorted(chart.glob("ci/*.yaml"))]:
        found = faults(helm, chart, values)
        print(f"{values}: {'; '.join(found) or 'ok'}")
        status |= bool(found)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
