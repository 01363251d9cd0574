"""Servers that a test or a scenario starts by the command line."""

from __future__ import annotations

import base64
import socket
from pathlib import Path

import pytest

from loadtest.servers import free_ports, is_serving, new_snapshot_key, serving


def test_a_server_that_ends_before_it_answers_is_reported(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"does not start.* serve .*nothing --local --port \d+"),
        serving(tmp_path / "nothing", "--local"),
    ):
        pass


def test_a_port_without_a_server_does_not_serve() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not is_serving(f"127.0.0.1:{silent.getsockname()[1]}")


def test_free_ports_are_distinct_and_can_be_taken() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_every_key_for_snapshots_is_new() -> None:
    keys = [base64.b64decode(*new_snapshot_key().values()) for _ in range(2)]
    assert keys[0] != keys[1] and {len(key) for key in keys} == {32}
