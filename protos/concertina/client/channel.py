"""Connections to a server: plaintext, TLS or mTLS, and the API key sent with every call."""

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
    # gRPC servers close connections that ping more often than every five minutes.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A restarted server is found again within seconds; gRPC's default is up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 3_000),
    # Each client has its own connection; gRPC would let clients in a process share one.
    ("grpc.use_local_subchannel_pool", 1),
)

Stub = TypeVar("Stub")


@dataclass(frozen=True)
class Tls:
    """How to use TLS with a server. All files are PEM.

    ca: authorities to trust; None for those that gRPC comes with.
    cert, cert_key: certificate and private key for a server that asks for them (mTLS).
    """

    ca: Path | None = None
    cert: Path | None = None
    cert_key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """The credentials for gRPC. Raises OSError if a file cannot be read."""
        files = (self.ca, self.cert_key, self.cert)
        authority, key, cert = (None if file is None else file.read_bytes() for file in files)
        return grpc.ssl_channel_credentials(authority, key, cert)


@dataclass(frozen=True)
class Access:
    """What a server needs to let a caller in: a key, TLS, both or nothing."""

    key: str | None = field(default=None, repr=False)
    tls: Tls | None = None

    def keyed(self, stub: Stub) -> Stub:
        """The same stub; from now on it sends the key with every call.

        If there is no key, `CONCERTINA_KEY` is used, if set. Raises InvalidRequest for a key with
        characters that a header cannot hold.
        """
        key = (os.environ.get(KEY_VARIABLE, "") if self.key is None else self.key).strip()
        if not (key.isascii() and key.isprintable()):
            raise InvalidRequest("the API key has characters that no key has: use printable ASCII")
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
