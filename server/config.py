"""Settings of a server. They are checked when they are created, and do not change."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_args

from concertina.addresses import join, reachable

Provider = Literal["cpu", "cuda"]
"""Device that computes: the CPU, or an NVIDIA GPU."""

MEBIBYTE = 1024 * 1024
LARGEST_RESPONSE: Final = 16 * MEBIBYTE
"""Largest size of a response, which is also what our client takes."""


class ConfigError(ValueError):
    """A setting is out of its range. The message names the setting, the value and the range."""


class Range(NamedTuple):
    """The smallest and the largest value of a number."""

    lowest: float
    highest: float


RANGES: Final = {
    "slots": Range(1, 4096),
    "queue_limit": Range(0, 1_000_000),
    "queue_tokens": Range(1, 2**40),
    "state_limit_bytes": Range(0, 2**50),
    "stream_buffer": Range(1, 1_000_000),
    "prefill_share": Range(0.01, 0.95),
    "prefix_cache_bytes": Range(0, 1024 * 1024 * MEBIBYTE),
    "prefill_chunk": Range(1, 1_000_000),
    "threads": Range(0, 1024),
    "draft_tokens": Range(0, 256),
    "session_bytes": Range(0, 1024 * 1024 * MEBIBYTE),
    "snapshot_interval": Range(1, 1_000_000_000),
    "port": Range(1, 65535),
    "metrics_port": Range(0, 65535),
    "replicas": Range(1, 256),
    "max_request_bytes": Range(MEBIBYTE, 1024 * MEBIBYTE),
    "drain_seconds": Range(0, 24 * 3600),
    "snapshot_ttl": Range(1, 30 * 24 * 3600),
    "http_port": Range(0, 65535),
    "plain_port": Range(0, 65535),
    "max_body_bytes": Range(1024, 1024 * MEBIBYTE),
    "streams_per_key": Range(1, 1_000_000),
    "slow_reader_seconds": Range(1, 3600),
}
"""The range of every number of EngineConfig, ServeConfig and GatewaySettings."""


def check_numbers(config: Any) -> None:
    """Raise ConfigError for a number of a configuration that is out of its range."""
    for setting in fields(config):
        if setting.name not in RANGES:
            continue
        value, (lowest, highest) = getattr(config, setting.name), RANGES[setting.name]
        if not lowest <= value <= highest:
            raise ConfigError(f"{setting.name} is {value}: it must be from {lowest} to {highest}")


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine: how it shares the machine among streams."""

    slots: int = 32
    """Number of streams that decode at the same time."""

    queue_limit: int = 256
    """Largest number of streams that wait for a slot; more are refused at once."""

    queue_tokens: int = 4 * 1024 * 1024
    """Largest number of prompt tokens that wait for prefill; more are refused at once."""

    state_limit_bytes: int = 0
    """Largest state in bytes that all admitted streams can reach; 0 is half of the memory."""

    stream_buffer: int = 256
    """Tokens that a reader may lag behind before its stream is paused."""

    prefill_share: float = 0.2
    """Largest share of the loop's time that prefill may take while streams decode."""

    prefix_cache_bytes: int = 64 * MEBIBYTE
    """Memory for the folded blocks that prompts share; 0 keeps none."""

    prefill_chunk: int = 512
    """Most prompt tokens in one pass; running streams decode in between."""

    threads: int = 0
    """Threads of one step; 0 uses all cores."""

    draft_tokens: int = 0
    """Draft tokens to guess while a single stream runs; 0 turns it off. Engines of bundles with
    matrices of few bits turn it off, too."""

    snapshot_interval: int = 256
    """Tokens between two snapshots of a kept stream; taken when a block folds."""

    session_bytes: int = 1024 * MEBIBYTE
    """Memory for the state of ended sessions; above it, who uses most loses the oldest."""

    chat_template: str = field(default="", repr=False)
    """A chat template in place of the bundle's own; empty leaves that."""

    provider: Provider = "cpu"
    """Device that computes and holds the state in its memory."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.provider not in get_args(Provider):
            raise ConfigError(
                f"provider is {self.provider}: it must be {' or '.join(get_args(Provider))}"
            )


@dataclass(frozen=True)
class TlsConfig:
    """Files (PEM) for TLS at the gRPC port."""

    cert: Path
    """Certificate of the server, followed by the intermediate certificates."""

    key: Path
    """Private key of the certificate, without a password."""

    client_ca: Path | None = None
    """CAs of the certificates that callers must present (mTLS); None requires no certificate."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that are set."""
        return tuple(file for file in (self.cert, self.key, self.client_ca) if file is not None)


@dataclass(frozen=True)
class ServeConfig:
    """Settings of a server: bundles, addresses, number of replicas."""

    bundles: tuple[Path, ...]
    """Bundle folders; every replica opens an engine for each. Empty with `watch`."""

    watch: Path | None = None
    """Directory to watch: its bundles are served as they change. None serves `bundles`."""

    host: str = "127.0.0.1"
    """Address that callers connect to; `0.0.0.0` or `::` opens the port to the network."""

    port: int = 9000
    """Port of the gRPC services."""

    metrics_port: int = 9100
    """Port for Prometheus metrics and health on the same host; 0 turns it off."""

    http_port: int = 0
    """Port of OpenAI's HTTP API on the same host; 0 turns it off."""

    plain_port: int = 0
    """Port on loopback that accepts plaintext while the others have TLS; 0 opens none."""

    replicas: int = 1
    """Number of server processes; each has all engines."""

    max_request_bytes: int = 4 * MEBIBYTE
    """Largest size of a request that is received; some methods take less (`largest_bytes`)."""

    drain_seconds: int = 60
    """Time for running streams to end after a stop, or after their bundle is removed."""

    keys: Path | None = None
    """File of API keys; callers then need one. None serves anyone who can reach the port."""

    snapshots: str = ""
    """URI of the snapshot store, in fsspec's form; empty stores none."""

    snapshots_optional: bool = False
    """Start also while the snapshot store cannot be used."""

    snapshot_ttl: int = 3600
    """Seconds after which a snapshot expires."""

    tls: TlsConfig | None = None
    """TLS files; the port then accepts TLS only. None accepts plaintext."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    """Settings of every engine."""

    def __post_init__(self) -> None:
        if not self.bundles and self.watch is None:
            raise ConfigError("bundles is empty: name at least one bundle folder")
        if self.bundles and self.watch is not None:
            raise ConfigError(
                f"watch is {self.watch}, and bundles has {len(self.bundles)}: set only one of them"
            )
        if not self.host:
            raise ConfigError("host is empty: give an address such as 127.0.0.1")
        check_numbers(self)
        if self.metrics_port == self.port:
            raise ConfigError(f"metrics_port is {self.port}: it must differ from port")
        if self.http_port and self.http_port in (self.port, self.metrics_port):
            raise ConfigError(
                f"http_port is {self.http_port}: it must differ from port and metrics_port"
            )
        if self.plain_port and self.tls is None:
            raise ConfigError(f"plain_port is {self.plain_port}: it needs TLS at the other port")
        if self.plain_port and self.plain_port in (self.port, self.metrics_port, self.http_port):
            raise ConfigError(f"plain_port is {self.plain_port}: it must differ from other ports")

    @property
    def address(self) -> str:
        """Address of the gRPC port, as seen from this machine."""
        return join(reachable(self.host), self.port)
