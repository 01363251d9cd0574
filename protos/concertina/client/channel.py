"""Connections to a server: plaintext, TLS or mTLS, and the API key sent with every call."""

from __future__ import annotations

import os
from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from concertina.addresses import has_port, host_of, is_loopback
from concertina.client.errors import InvalidRequest
from concertina.client.times import timeout_seconds
from concertina.shown import shown
from concertina.v1 import limits_pb2

KEY_VARIABLE: Final = "CONCERTINA_KEY"
_MAX_KEY_CHARACTERS: Final = 4096  # gRPC refuses headers of 8 KiB and more
_LARGEST_ANSWER: Final = 16 * 1024 * 1024
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", _LARGEST_ANSWER),
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

    def calls(self, stub: Stub) -> Stub:
        """The same stub; from now on its calls are checked, and the key goes with each.

        A call raises InvalidRequest for a timeout that is none, and for a request that is too
        large to be sent. If there is no key, `CONCERTINA_KEY` is used, if set. Raises
        InvalidRequest for a key that a header cannot hold.
        """
        key = (os.environ.get(KEY_VARIABLE, "") if self.key is None else self.key).strip()
        if not (key.isascii() and key.isprintable()):
            raise InvalidRequest("the API key has characters that no key has: use printable ASCII")
        if len(key) > _MAX_KEY_CHARACTERS:
            raise InvalidRequest(
                f"the API key has {len(key):,} characters, the limit is {_MAX_KEY_CHARACTERS:,}: "
                "give the secret that `concertina keys add` shows"
            )
        metadata = (("authorization", f"Bearer {key}"),) if key else None
        for method, call in list(vars(stub).items()):
            setattr(stub, method, _checked(call, metadata))
        return stub

    def channel(self, address: str) -> grpc.Channel:
        """A connection for blocking code."""
        options = channel_options(address)
        if self.tls is None:
            return grpc.insecure_channel(address, options=options)
        return grpc.secure_channel(address, self.tls.credentials(), options=options)

    def async_channel(self, address: str) -> grpc.aio.Channel:
        """A connection for asyncio code."""
        options = channel_options(address)
        if self.tls is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, self.tls.credentials(), options=options)


def channel_options(address: str) -> tuple[tuple[str, int], ...]:
    """The options of a channel to an address; to this machine it uses no proxy.

    Raises InvalidRequest for what is no address.
    """
    if not (address.isascii() and address.isprintable() and has_port(address)):
        raise InvalidRequest(
            f"address is {shown(address)}: give HOST:PORT, for example 127.0.0.1:9000 or [::1]:9000"
        )
    direct = is_loopback(host_of(address))
    return (*_OPTIONS, ("grpc.enable_http_proxy", 0)) if direct else _OPTIONS


def _checked(call: Any, metadata: tuple[tuple[str, str], ...] | None) -> Callable[..., Any]:
    def make(request: Any, timeout: float | None = None) -> Any:
        if isinstance(request, Message):
            _require_size(request)
        return call(request, timeout=timeout_seconds(timeout), metadata=metadata)

    return make


def _require_size(request: Message) -> None:
    """Raise InvalidRequest for a request that no server takes, because of its size."""
    size, most = request.ByteSize(), _largest_bytes(request.DESCRIPTOR)
    if most and size > most:
        raise InvalidRequest(
            f"the request has {size:,} bytes, the limit is {most:,}: "
            "send a shorter prompt or shorter lists",
            field=_largest_field(request),
            limit=most,
        )


@cache
def _largest_bytes(kind: Descriptor) -> int:
    """Most bytes of a request of this type; 0 if it is not known."""
    options: Any = kind.GetOptions()
    return int(options.Extensions[limits_pb2.largest_bytes])


def _largest_field(message: Message) -> str:
    """The name of the field that takes the most bytes, such as `prompt.text`."""
    fields = message.ListFields()
    if not fields:
        return ""
    field, value = max(fields, key=lambda given: _size(given[1]))
    inner = _largest_field(value) if isinstance(value, Message) else ""
    return f"{field.name}.{inner}" if inner else field.name


def _size(value: Any) -> int:
    if isinstance(value, Message):
        return value.ByteSize()
    return len(value) if isinstance(value, Sized) else 8
