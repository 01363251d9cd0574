"""TCP ports of this machine."""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack


class PortTaken(OSError):
    """Somebody else listens there."""


def free_ports(count: int) -> list[int]:
    """Distinct ports on which nobody listens."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def require_free(host: str, port: int, remedy: str) -> None:
    """Raise `PortTaken`, which ends with `remedy`, when somebody listens on the port already.

    gRPC would not notice: its servers share a port by default, and each gets some of the calls.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        # Connections of a server that has just stopped do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise PortTaken(f"port {port} on {host} is taken: {remedy}") from None
