"""TCP ports of this machine."""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack


class PortTaken(OSError):
    """Another process listens on the port."""


def free_ports(count: int) -> list[int]:
    """Distinct ports that no process listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def require_free(host: str, port: int, remedy: str) -> None:
    """Raise `PortTaken`, with `remedy` in its message, if a process listens on the port.

    gRPC does not detect this: its servers share a port by default, and each gets some of the calls.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        # Ignore closing connections of a server that has just stopped.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise PortTaken(f"port {port} on {host} is taken: {remedy}") from None
