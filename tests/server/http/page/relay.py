"""A wire between a browser and a gateway that can be cut."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field


@dataclass(eq=False)
class Relay:
    """Passes on what comes, to `target`."""

    target: tuple[str, int]
    listener: socket.socket
    connections: list[socket.socket] = field(default_factory=list)
    passing: list[threading.Thread] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Where it listens."""
        host, port = self.listener.getsockname()
        return f"{host}:{port}"

    def cut(self) -> None:
        """Cut all connections that there are; new ones may come."""
        for each in self.connections:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        """Pass on until the listener is closed."""
        with suppress(OSError):
            while True:
                caller, _ = self.listener.accept()
                callee = socket.create_connection(self.target)
                self.connections += [caller, callee]
                for source, sink in ((caller, callee), (callee, caller)):
                    thread = threading.Thread(target=_pass_on, args=(source, sink), daemon=True)
                    thread.start()
                    self.passing.append(thread)

    def close(self) -> None:
        """Close what was cut."""
        for thread in self.passing:
            thread.join(30)
        for each in self.connections:
            each.close()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while part := source.recv(65536):
            sink.sendall(part)
    for each in (source, sink):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


@contextmanager
def relayed(address: str) -> Iterator[Relay]:
    """A wire to a gateway."""
    host, _, port = address.rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        relay = Relay((host, int(port)), listener)
        running = threading.Thread(target=relay.run, daemon=True)
        running.start()
        try:
            yield relay
        finally:
            relay.cut()
            listener.shutdown(socket.SHUT_RDWR)
    running.join(30)
    relay.cut()  # also what came while it was cut
    relay.close()
