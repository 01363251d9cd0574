"""What can be set about serving: frozen, checked once, and everywhere else taken as true."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

Provider = Literal["cpu", "cuda"]
"""What computes: the processor, or an NVIDIA GPU."""

MEBIBYTE = 1024 * 1024


class ConfigError(ValueError):
    """A setting out of its range. The message names the setting, the value and the range."""


def _check(setting: str, value: float, lowest: float, highest: float) -> None:
    if not lowest <= value <= highest:
        raise ConfigError(f"{setting} is {value}: it must be from {lowest} to {highest}")


@dataclass(frozen=True)
class EngineConfig:
    """How one engine divides its machine among streams."""

    slots: int = 32
    """Streams that decode at once."""

    queue_limit: int = 256
    """Streams that may wait for a slot; more are refused at once."""

    queue_tokens: int = 4 * 1024 * 1024
    """Prompt tokens that may wait for work on them to begin; more are refused at once."""

    state_limit_bytes: int = 0
    """State that the streams taken on may come to hold; 0 is half of the machine's memory."""

    stream_buffer: int = 256
    """Tokens that a slow reader may lag behind before its stream is paused."""

    prefill_share: float = 0.2
    """Largest share of the loop's time that prefill may take while streams decode."""

    prefix_cache_bytes: int = 64 * MEBIBYTE
    """Memory for folded blocks that later prompts may begin with; 0 keeps none."""

    prefill_chunk: int = 512
    """Prompt tokens of one pass at most; running streams step in between."""

    threads: int = 0
    """Threads of one step; 0 takes every core."""

    draft_tokens: int = 0
    """Tokens that may be guessed ahead while one stream runs alone; 0 guesses none."""

    snapshot_interval: int = 256
    """Tokens between two snapshots of a stream that is kept; taken when a block folds."""

    session_bytes: int = 1024 * MEBIBYTE
    """Memory for the state of sessions that rest; beyond it, those left first are forgotten."""

    provider: Provider = "cpu"
    """What computes, and in whose memory the state lies."""

    def __post_init__(self) -> None:
        _check("slots", self.slots, 1, 4096)
        _check("queue_limit", self.queue_limit, 0, 1_000_000)
        _check("queue_tokens", self.queue_tokens, 1, 2**40)
        _check("state_limit_bytes", self.state_limit_bytes, 0, 2**50)
        _check("stream_buffer", self.stream_buffer, 1, 1_000_000)
        _check("prefill_share", self.prefill_share, 0.01, 0.95)
        _check("prefix_cache_bytes", self.prefix_cache_bytes, 0, 1024 * 1024 * MEBIBYTE)
        _check("prefill_chunk", self.prefill_chunk, 1, 1_000_000)
        _check("threads", self.threads, 0, 1024)
        _check("draft_tokens", self.draft_tokens, 0, 256)
        _check("session_bytes", self.session_bytes, 0, 1024 * 1024 * MEBIBYTE)
        _check("snapshot_interval", self.snapshot_interval, 1, 1_000_000_000)
        if self.provider not in get_args(Provider):
            raise ConfigError(
                f"provider is {self.provider}: it must be {' or '.join(get_args(Provider))}"
            )


@dataclass(frozen=True)
class TlsConfig:
    """Files (PEM) that the gRPC port needs for TLS."""

    cert: Path
    """Certificate of the server, followed by those between it and its authority."""

    key: Path
    """Private key of the certificate, without a password."""

    client_ca: Path | None = None
    """Authorities of the certificates that callers must show (mTLS); None asks for none."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them."""
        return tuple(file for file in (self.cert, self.key, self.client_ca) if file is not None)


@dataclass(frozen=True)
class ServeConfig:
    """What is served, where, and by how many replicas."""

    bundles: tuple[Path, ...]
    """Folders of the bundles; every replica opens an engine for each. Empty with `watch`."""

    watch: Path | None = None
    """Directory whose bundles are served as they come and go; None serves `bundles`."""

    host: str = "127.0.0.1"
    """Address that callers connect to; `0.0.0.0` opens the port to the network."""

    port: int = 9000
    """Port of the gRPC services."""

    metrics_port: int = 9100
    """Port of the Prometheus page on the same host; 0 leaves it out."""

    replicas: int = 1
    """Processes that serve; each holds all engines."""

    max_message_bytes: int = 16 * MEBIBYTE
    """Largest request or response."""

    drain_seconds: int = 60
    """How long running streams may go on once the server was asked to stop, or a bundle went."""

    keys: Path | None = None
    """File of the API keys that callers need; None serves everyone who reaches the port."""

    snapshots: str = ""
    """URI of the store of snapshots, as fsspec takes them; empty keeps none."""

    snapshot_ttl: int = 3600
    """Seconds after which a snapshot must no longer be used."""

    tls: TlsConfig | None = None
    """With it, the port speaks nothing but TLS; without it, plaintext."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    """The same for every engine."""

    def __post_init__(self) -> None:
        if not self.bundles and self.watch is None:
            raise ConfigError("bundles is empty: name at least one folder that holds a bundle")
        if self.bundles and self.watch is not None:
            raise ConfigError(
                f"watch is {self.watch}, and bundles names {len(self.bundles)}: give one of the two"
            )
        if not self.host:
            raise ConfigError("host is empty: give an address such as 127.0.0.1")
        _check("port", self.port, 1, 65535)
        _check("metrics_port", self.metrics_port, 0, 65535)
        if self.metrics_port == self.port:
            raise ConfigError(f"metrics_port is {self.port}: it must differ from port")
        _check("replicas", self.replicas, 1, 256)
        _check("max_message_bytes", self.max_message_bytes, MEBIBYTE, 1024 * MEBIBYTE)
        _check("drain_seconds", self.drain_seconds, 0, 24 * 3600)
        _check("snapshot_ttl", self.snapshot_ttl, 1, 30 * 24 * 3600)

    @property
    def address(self) -> str:
        """Where this machine reaches the gRPC port."""
        return f"{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"
