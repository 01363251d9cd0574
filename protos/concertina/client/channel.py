"""Connections to a server: plaintext, TLS or mTLS, and the API key that goes with every call."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import grpc

from concertina.client.errors import InvalidRequest

KEY_VARIABLE: Final = "CONCERTINA_KEY"
_MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # gRPC servers hang up on pings that come more often than every five minutes.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A server that was restarted is found again within seconds; gRPC would wait up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 3_000),
    # A connection per client: several clients then really spread over several connections.
    ("grpc.use_local_subchannel_pool", 1),
)

Stub = TypeVar("Stub")


@dataclass(frozen=True)
class Tls:
    """How to speak TLS with a server. All files are PEM.

    ca: authorities that may vouch for the server; None for those that gRPC comes with.
    cert, cert_key: what to show a server that asks for a certificate (mTLS), and its private key.
    """

    ca: Path | None = None
    cert: Path | None = None
    cert_key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """The same for gRPC. Raises OSError when a file cannot be read."""
        files = (self.ca, self.cert_key, self.cert)
        authority, key, cert = (None if file is None else file.read_bytes() for file in files)
        return grpc.ssl_channel_credentials(authority, key, cert)


@dataclass(frozen=True)
class Access:
    """What it takes to be let in: a key, TLS, both or nothing."""

    key: str | None = field(default=None, repr=False)
    tls: Tls | None = None

    def keyed(self, stub: Stub) -> Stub:
        """The stub, made to send the key with every call.

        Without a key here it is that of `CONCERTINA_KEY`, if there is one. Raises InvalidRequest
        for a key that no header can carry.
        """
        key = (os.environ.get(KEY_VARIABLE, "") if self.key is None else self.key).strip()
        if not (key.isascii() and key.isprintable()):
            raise InvalidRequest("the API key holds characters that no key has")
        if key:
            metadata = (("authorization", f"Bearer {key}"),)
            for method, call in list(vars(stub).items()):
                setattr(stub, method, partial(call, metadata=metadata))
        return stub

    def channel(self, address: str) -> grpc.Channel:
        """A connection for blocking code."""
        if self.tls is None:
            return grpc.insecure_channel(address, options=_OPTIONS)
        return grpc.secure_channel(address, self.tls.credentials(), options=_OPTIONS)

    def async_channel(self, address: str) -> grpc.aio.Channel:
        """A connection for asyncio code."""
        if self.tls is None:
            return grpc.aio.insecure_channel(address, options=_OPTIONS)
        return grpc.aio.secure_channel(address, self.tls.credentials(), options=_OPTIONS)
