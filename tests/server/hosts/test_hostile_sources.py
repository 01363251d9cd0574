"""`concertina serve SOURCE` ends soon, in little memory and with words, whatever SOURCE is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from server.ops.ports import free_ports
from tests.model.pretrained.hostile import HOSTILE

pytestmark = pytest.mark.slow

_MOST_CPU_S, _MOST_BYTES = 40.0, 1 << 30
_KILOBYTE = 1 if sys.platform == "darwin" else 1024


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
            command,
            env=os.environ | {"CONCERTINA_CACHE": str(cache), "COLUMNS": "500"},
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            _, status, used = os.wait4(process.pid, 0)  # of the processes that convert, too
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        said.seek(0)
        text = said.read()
    assert process.returncode == 1, text
    assert re.search(words, text) and "is not served: it could not be converted" in text
    assert "Traceback" not in text
    assert used.ru_utime + used.ru_stime < _MOST_CPU_S
    assert used.ru_maxrss * _KILOBYTE < _MOST_BYTES
    assert list(cache.iterdir()) == []
