"""The demo of a folded model: what it says, what it leaves, and that it fails with words."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from concertina.bundle.manifest import MANIFEST, read_manifest
from server.hosts.demo import DemoFailed
from server.hosts.demo_chat import conclusion, demo_chat
from tests.e2e.servers import concertina
from tests.pretrained_bundles import write_source

WAIT = 240.0


def demo(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = concertina("demo-chat", *map(str, arguments), text=True, **pipes)
    output, errors = process.communicate(timeout=WAIT)
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


@pytest.mark.slow
def test_a_pretrained_model_is_folded_quantised_served_and_asked(tmp_path: Path) -> None:
    source, folder = write_source(tmp_path / "tiny", context=2048), tmp_path / "made"
    done = demo(source, "--folder", folder, "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    for step in ("convert", "fold to a quarter of the state", "quantise and export"):
        assert re.search(rf"^{step}: \d+ s\n  \S", said, re.MULTILINE), said
    assert re.search(r"0\.\d+ of the state of full attention at 2,048 tokens", said)
    assert re.search(r"2,048 tokens has \d\.\d MB of state in float32, not \d\.\d$", said, re.M)
    assert re.search(r"nats a token less than \w+ that keep as much", said)
    assert ".unfinished" not in said
    assert re.search(r"int8: .* against float32", said)
    assert said.count("\n> ") == 4 and said.count(" tokens read in ") == 4
    long = max(int(n.replace(",", "")) for n in re.findall(r"\[([\d,]+) tokens read", said))
    assert 512 < long < 1100
    assert said.endswith(f"stopped; to serve it again: concertina serve {folder / 'bundle'}\n")
    assert sorted(path.name for path in folder.iterdir()) == ["bundle", "report.html"]
    manifest = read_manifest(folder / "bundle")
    assert manifest.name == "tiny" and manifest.quantisation.bits == 8
    assert manifest.metrics["state_share"] <= 0.25
    assert manifest.HasField("fold")

    with in_a_terminal(source, "--folder", folder) as (process, terminal):
        shown = read_until(terminal, b"> ")
        assert f"{folder / 'bundle'} is there from before".encode() in shown
        assert b"convert" not in shown
        os.write(terminal, b"Hello\n")
        assert len(read_until(terminal, b"> ")) > 10  # what was typed, and an answer
        os.write(terminal, b"\x04")
        assert b"to serve it again" in read_until(terminal, b"bundle\r\n")
        assert process.wait(60) == 0


@contextmanager
def in_a_terminal(*arguments: Path | str) -> Iterator[tuple[psutil.Popen, int]]:
    """The demo in a terminal, and the end of it where a person sits."""
    terminal, other = pty.openpty()
    process = concertina("demo-chat", *map(str, arguments), stdin=other, stdout=other, stderr=other)
    os.close(other)
    try:
        yield process, terminal
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
        os.close(terminal)


def read_until(terminal: int, text: bytes) -> bytes:
    """What was shown until `text` was."""
    shown, end = b"", time.monotonic() + WAIT
    while text not in shown:
        ready, _, _ = select.select([terminal], [], [], max(0, end - time.monotonic()))
        assert ready, shown
        shown += os.read(terminal, 4096)
    return shown


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DemoFailed, match=r"gone\.gguf does not exist: `make demo-chat` fetches"):
        demo_chat(tmp_path / "gone.gguf", folder=tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_step_that_fails_says_what_the_command_said(tmp_path: Path) -> None:
    """And what could be served by mistake the next time is not there."""
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    done = demo(tmp_path / "broken.gguf", "--folder", tmp_path / "made")
    assert done.returncode == 1
    assert "`concertina convert` failed, see above" in done.stderr
    assert "broken.gguf" in done.stderr.split("`concertina convert`")[0]
    assert not (tmp_path / "made" / "bundle" / MANIFEST).exists()


def test_a_step_says_what_its_command_concludes() -> None:
    said = "layer 1\nb/run: 3 MB\nfolds win; b/run/report.html\nand more\n"
    for arguments in (("a", "b/run"), (Path("b/run"), "--budget")):
        assert conclusion(said, arguments) == ["3 MB", "folds win", "and more"]
    assert conclusion("layer 1: 3\n", ("a", "b")) == []
