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
    """Somebody else listens there."""


def free_ports(count: int) -> list[int]:
    """Distinct ports on which nobody listens, and which nobody else gets who asks for any port.

    Between here and who is to listen, seconds may pass.
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
