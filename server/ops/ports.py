"""TCP ports of this machine."""

from __future__ import annotations

import errno
import random
import socket
from contextlib import ExitStack
from typing import Final

# Systems hand out ports above these by themselves, so nobody comes by one of these by chance.
_RANGE: Final = range(20_000, 30_000)
_draw: Final = random.SystemRandom()


class PortTaken(OSError):
    """Another process listens on the port."""


def free_ports(count: int) -> list[int]:
    """Distinct ports that no process listens on, nor is given when it asks for any port.

    Seconds may pass before they are used.
    """
    ports: list[int] = []
    with ExitStack() as stack:
        for port in _draw.sample(_RANGE, len(_RANGE)):
            if len(ports) == count:
                break
            each = stack.enter_context(socket.socket())
            try:
                each.bind(("127.0.0.1", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                ports.append(port)
    if len(ports) < count:
        raise PortTaken(
            f"{count} ports are wanted, {len(ports)} from {_RANGE} are free: end servers"
        )
    return ports


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
