"""The gateway's process beside a server: started again when it dies, but not when it should end."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from server.config import ServeConfig
from server.hosts.gateway import Gateway, GatewayFailed, gateway
from server.ops.ports import free_ports

WAIT = 60.0
PROGRAM = """
import os, pathlib, socket, sys
folder, port, lives = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
number = len(list(folder.iterdir()))
if number >= lives:
    (folder / str(number)).touch()
    sys.exit(3)
listener = socket.create_server(("127.0.0.1", port))
(folder / str(number)).write_text(str(os.getpid()))
while True:
    listener.accept()[0].close()
"""


@contextmanager
def running(folder: Path, lives: int = 100) -> Iterator[Gateway]:
    """A program that accepts connections, in place of a gateway. Those after `lives` end at once.

    Each writes a file with its process id.
    """
    (port,) = free_ports(1)
    config = ServeConfig((), watch=folder, http_port=port, drain_seconds=1)
    arguments = (str(folder), str(port), str(lives))
    run = Gateway(config, (sys.executable, "-c", PROGRAM, *arguments))
    run.start()
    try:
        run.wait_until_ready()
        yield run
    finally:
        run.kill()


def _pid(folder: Path, number: int) -> int:
    """The process that was started after so many others, once it accepts connections."""
    for _ in range(round(WAIT / 0.05)):
        if (folder / str(number)).exists() and (text := (folder / str(number)).read_text()):
            return int(text)
        threading.Event().wait(0.05)
    raise AssertionError(f"process {number} was not started")


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("server.hosts.gateway")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_it_is_started_again_as_often_as_it_dies(
    tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    with running(tmp_path) as run:
        for number in range(2):
            os.kill(_pid(tmp_path, number), signal.SIGKILL)
        last = _pid(tmp_path, 2)
        with closing(socket.create_connection(("127.0.0.1", run.config.http_port), WAIT)):
            pass
        assert [each.levelname for each in logged.records][:2] == ["ERROR"] * 2
        assert f"port {run.config.http_port} has ended (signal 9)" in logged.messages[0]
        run.stop()
        with pytest.raises(ProcessLookupError):
            os.kill(last, 0)
    assert len(list(tmp_path.iterdir())) == 3


def test_one_that_was_told_to_end_with_the_server_is_not_started_again(
    tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """As Ctrl-C tells all processes of a terminal, of which the gateway may end first."""
    with running(tmp_path) as run:
        os.kill(_pid(tmp_path, 0), signal.SIGTERM)
        run.stop()
        threading.Event().wait(1.0)
    assert len(list(tmp_path.iterdir())) == 1
    assert logged.messages == []


def test_one_that_cannot_live_is_tried_less_and_less_often(tmp_path: Path) -> None:
    with running(tmp_path, lives=1):
        os.kill(_pid(tmp_path, 0), signal.SIGKILL)
        threading.Event().wait(4.0)
    # After 0.5, 1 and 2 seconds. Without growth there were eight.
    assert 2 <= len(list(tmp_path.iterdir())) <= 4


def test_one_that_never_starts_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(GatewayFailed, match="did not start"), running(tmp_path, lives=0):
        pass
    assert len(list(tmp_path.iterdir())) == 1


def test_without_a_port_there_is_none(tmp_path: Path) -> None:
    with gateway(ServeConfig((), watch=tmp_path, http_port=0)) as run:
        run.wait_until_ready()
        run.stop()
        assert run.command == ()
