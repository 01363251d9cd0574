from __future__ import annotations

import socket

import pytest

from server.ops.ports import PortTaken, free_ports, require_free


def test_free_ports_are_free_and_distinct() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        require_free("127.0.0.1", port, "")


@pytest.mark.parametrize("shared", [False, True])
def test_a_taken_port_is_named_with_the_remedy(shared: bool) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortTaken, match=f"port {port} on 127.0.0.1 is taken: choose another"):
            require_free("127.0.0.1", port, "choose another")
    require_free("127.0.0.1", port, "")


def test_another_address_of_this_machine_is_taken_by_all_of_them() -> None:
    with socket.create_server(("0.0.0.0", 0)) as other, pytest.raises(PortTaken):
        require_free("127.0.0.1", other.getsockname()[1], "")


def test_an_address_that_is_not_ours_is_not_a_taken_port() -> None:
    with pytest.raises(OSError, match="assign") as raised:
        require_free("203.0.113.1", 9000, "")
    assert not isinstance(raised.value, PortTaken)
