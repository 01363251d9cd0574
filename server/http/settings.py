"""Settings of a gateway."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from concertina.addresses import is_loopback, join, reachable
from concertina.client import Tls
from server.config import TlsConfig, check_numbers


@dataclass(frozen=True)
class GatewaySettings:
    """Where a gateway listens, whom it calls, and how much it takes of one caller."""

    upstream: str
    """Address of the gRPC server."""

    upstream_tls: Tls | None = None
    """How to use TLS with the gRPC server; None for plaintext."""

    host: str = "127.0.0.1"
    """Address to listen on."""

    port: int = 8000
    """Port to listen on."""

    tls: TlsConfig | None = None
    """TLS files of this port; None accepts plaintext."""

    allowed_hosts: tuple[str, ...] = ()
    """Names that `Host` may have besides those of this machine, while only it can connect."""

    drain_seconds: int = 60
    """Time for running streams to end after a stop."""

    max_body_bytes: int = 8 * 1024 * 1024
    """Largest body of a request."""

    streams_per_key: int = 512
    """Streams that the callers with one key, or all without one, may have at a time."""

    body_seconds: float = 30.0
    """Time for the body of a request to arrive."""

    slow_reader_seconds: float = 60.0
    """Time that a reader may take nothing before its stream is given up."""

    ping_seconds: float = 15.0
    """Time without an event after which a stream sends a comment."""

    with_parent: bool = False
    """End when standard input does: when the process that started this one ends."""

    def __post_init__(self) -> None:
        check_numbers(self)

    @property
    def only_this_machine(self) -> bool:
        """Whether nobody else can connect."""
        return is_loopback(self.host)

    @property
    def url(self) -> str:
        """Where it answers, as seen from this machine."""
        scheme = "http" if self.tls is None else "https"
        return f"{scheme}://{join(reachable(self.host), self.port)}"

    @property
    def tls_files(self) -> tuple[Path, ...]:
        """The files of `tls`."""
        return () if self.tls is None else self.tls.files
