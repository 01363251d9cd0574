"""A real Prometheus reads a real server, and every expression of ours finds something."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from concertina.client import Client
from server.ops.ports import free_ports
from tests.e2e.servers import ROOT, serving, until
from tests.prometheus import RULES, panels, program, rules, selectors

STOP_SECONDS = 30.0
SETTLED_SECONDS = 60.0
CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: {rules}
scrape_configs:
  - job_name: concertina
    static_configs: [{{targets: ["{target}"]}}]
"""


class Prometheus:
    """A running Prometheus."""

    def __init__(self, port: int) -> None:
        self._port = port

    def ask(self, expression: str) -> list[Any]:
        """What an expression finds now. Fails if it is none."""
        expression = expression.replace("$__rate_interval", "1m").replace("$model", ".*")
        query = urllib.parse.urlencode({"query": expression})
        url = f"http://127.0.0.1:{self._port}/api/v1/query?{query}"
        with urllib.request.urlopen(url, timeout=30) as page:
            answer = json.load(page)
        assert answer["status"] == "success", (expression, answer)
        found: list[Any] = answer["data"]["result"]
        return found

    def is_ready(self) -> bool:
        """Whether it answers."""
        try:
            return self.ask("vector(1)") != []
        except OSError:
            return False


@contextmanager
def watching(target: str, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus that reads this address every second, and evaluates our rules as often."""
    (port,) = free_ports(1)
    config = folder / "prometheus.yml"
    config.write_text(CONFIG.format(rules=[str(path) for path in RULES], target=target))
    command = [
        program("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    process = subprocess.Popen(command)
    try:
        prometheus = Prometheus(port)
        until(prometheus.is_ready, SETTLED_SECONDS)
        yield prometheus
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_SECONDS)


@pytest.mark.e2e
def test_every_panel_and_rule_has_data(tmp_path: Path) -> None:
    program("prometheus")  # skips before anything starts
    with (
        serving(str(ROOT / "bundles" / "python-4k"), "--local", "--threads", "1") as server,
        watching(server.metrics_address, tmp_path) as prometheus,
        Client(server.address) as client,
    ):
        until(lambda: prometheus.ask("concertina_build_info") != [], SETTLED_SECONDS)

        def settled() -> bool:  # a rate needs two readings, and one of them after a stream
            with client.generate("def f(x):", max_tokens=100, ignore_eos=True) as stream:
                for _ in stream:
                    pass
            return prometheus.ask("gen_ai_server_request_duration_seconds_count > 3") != []

        until(settled, SETTLED_SECONDS)
        expressions = dict(panels())
        for rule in rules():
            if "record" in rule:
                expressions[rule["record"]] = rule["record"]
            else:  # an alert finds something only when it fires, but what it reads is there
                expressions |= {
                    f"{rule['alert']}: {each}": each for each in selectors(rule["expr"])
                }
        assert len(expressions) > 60
        empty = dict(expressions)

        def filled() -> bool:
            settled()  # goes on with streams, so that no rate runs dry
            for where, expression in list(empty.items()):
                if prometheus.ask(expression):
                    del empty[where]
            return not empty

        with suppress(AssertionError):  # the next line says what is missing
            until(filled, SETTLED_SECONDS)
        assert not empty
        assert prometheus.ask("ALERTS") == []
