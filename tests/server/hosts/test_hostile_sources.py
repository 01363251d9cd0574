"""`concertina serve SOURCE` ends soon, in little memory and with words, whatever SOURCE is."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from server.ops.ports import free_ports
from tests.model.pretrained.hostile import HOSTILE

pytestmark = pytest.mark.slow

_MOST_CPU_S, _MOST_BYTES = 40.0, 1 << 30
_KILOBYTE = 1 if sys.platform == "darwin" else 1024
# A process is said to be as large as the one that started it, and whoever runs tests is large.
_MEASURED = """
import json, resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the processes that convert, too
with open(sys.argv[1], "w") as file:
    json.dump([code, used.ru_utime + used.ru_stime, used.ru_maxrss], file)
"""


@pytest.mark.parametrize(
    "name",
    [
        "a safetensors header of 4 GB",
        "a tokenizer with a billion merges",
        "a template that loops",
        "the tokenizer of another model",
        "tensors in one another",
    ],
)
def test_a_hostile_model_is_not_served(name: str, tmp_path: Path) -> None:
    make, words = HOSTILE[name]
    source, cache = make(tmp_path / "tiny"), tmp_path / "cache"
    port, metrics_port = free_ports(2)
    command = [sys.executable, "-m", "concertina.cli.main", "serve", str(source), "--local"]
    command += ["--port", str(port), "--metrics-port", str(metrics_port)]
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", _MEASURED, str(tmp_path / "used"), *command],
            env=os.environ | {"CONCERTINA_CACHE": str(cache), "COLUMNS": "500"},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait()
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        text = said.read()
    code, cpu_s, size = json.loads((tmp_path / "used").read_text())
    assert code == 1, text
    assert re.search(words, text) and "is not served: it could not be converted" in text
    assert "Traceback" not in text
    assert cpu_s < _MOST_CPU_S
    assert size * _KILOBYTE < _MOST_BYTES
    assert list(cache.iterdir()) == []
