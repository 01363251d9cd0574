"""Seals snapshots: encrypts and authenticates them, binds them to an owner, and lets them expire.

A sealed snapshot is the magic bytes, the length of the header (4 bytes, little-endian), the header,
a nonce, and the ciphertext of AES-256-GCM. The header is authenticated, but not encrypted.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
import time
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from google.protobuf.message import DecodeError

from concertina.v1 import snapshot_pb2 as pb
from server.config import ConfigError
from server.errors import SnapshotRefused

KEY_VARIABLE = "CONCERTINA_SNAPSHOT_KEY"
VERSION = 4
"""The format that is written. 2: parts with whole outputs; 3: only what is new; 4: grammars."""
READ_VERSIONS = (2, 3, 4)
"""The formats that are read: ours, and those before."""

_MAGIC = b"CONCERTINA-SNAP\n"
_NONCE_BYTES = 12
_KEY_BYTES = 32
_MAX_HEADER_BYTES = 65_536


class Sealer:
    """Seals with the first of its keys and opens with any of them, so that keys can be rotated."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._ciphers = [AESGCM(key) for key in keys]
        self.secret = hashlib.sha256(b"names" + keys[0]).digest()

    @staticmethod
    def from_environment() -> Sealer | None:
        """A sealer with the comma-separated keys of CONCERTINA_SNAPSHOT_KEY; None without keys.

        Raises ConfigError for an invalid key.
        """
        given = os.environ.get(KEY_VARIABLE, "")
        keys = [_key(text.strip()) for text in given.split(",") if text.strip()]
        return Sealer(keys) if keys else None

    @staticmethod
    def for_this_process() -> Sealer:
        """A sealer with a random key that only this process has."""
        return Sealer([secrets.token_bytes(_KEY_BYTES)])

    def seal(self, header: pb.SnapshotHeader, snapshot: pb.Snapshot) -> bytes:
        """The sealed snapshot, which is safe to store anywhere."""
        header_bytes = header.SerializeToString(deterministic=True)
        front = _MAGIC + len(header_bytes).to_bytes(4, "little") + header_bytes
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return front + nonce + self._ciphers[0].encrypt(nonce, snapshot.SerializeToString(), front)

    def open(self, sealed: bytes, owner: str) -> tuple[pb.SnapshotHeader, pb.Snapshot]:
        """Header and content of a sealed snapshot.

        Raises SnapshotRefused, with the reason, unless it is intact and belongs to `owner`.
        """
        header, front = _read_header(sealed)
        nonce, content = sealed[front:][:_NONCE_BYTES], sealed[front + _NONCE_BYTES :]
        for cipher in self._ciphers:
            try:
                opened = cipher.decrypt(nonce, content, sealed[:front])
                break
            except (InvalidTag, ValueError):
                continue
        else:
            raise SnapshotRefused(
                "the snapshot was changed, is truncated, or was sealed with a key that this server "
                f"does not have ({KEY_VARIABLE})"
            )
        if header.owner != owner:
            raise SnapshotRefused("the snapshot belongs to another API key")
        if header.version not in READ_VERSIONS:
            raise SnapshotRefused(
                f"the snapshot has format {header.version}, this server reads "
                f"{', '.join(map(str, READ_VERSIONS))}"
            )
        try:
            for time_of in (header.accepted, header.expires):
                time_of.ToNanoseconds()
            return header, pb.Snapshot.FromString(opened)
        except (DecodeError, ValueError):  # ValueError: an invalid time
            raise SnapshotRefused("the snapshot's content cannot be read") from None


def refuse_expired(header: pb.SnapshotHeader) -> None:
    """Raise SnapshotRefused if the snapshot has expired."""
    if header.expires.ToNanoseconds() < time.time_ns():
        raise SnapshotRefused(f"the snapshot expired at {header.expires.ToJsonString()}")


def _read_header(sealed: bytes) -> tuple[pb.SnapshotHeader, int]:
    """The header, and the number of bytes before the nonce. Raises SnapshotRefused."""
    begin = len(_MAGIC) + 4
    if len(sealed) < begin or not sealed.startswith(_MAGIC):
        raise SnapshotRefused("this is not a snapshot of Concertina, or it is truncated")
    size = int.from_bytes(sealed[len(_MAGIC) : begin], "little")
    if size > _MAX_HEADER_BYTES or len(sealed) < begin + size + _NONCE_BYTES:
        raise SnapshotRefused(f"the snapshot is truncated: it has {len(sealed)} bytes")
    try:
        return pb.SnapshotHeader.FromString(sealed[begin : begin + size]), begin + size
    except DecodeError:
        raise SnapshotRefused("the snapshot's header cannot be read: it was changed") from None


def _key(text: str) -> bytes:
    try:
        key = base64.b64decode(text, validate=True)
    except binascii.Error:
        key = b""
    if len(key) != _KEY_BYTES:
        raise ConfigError(
            f"{KEY_VARIABLE} must hold keys of {_KEY_BYTES} bytes in base64, separated by commas; "
            "make one with: openssl rand -base64 32"
        )
    return key
