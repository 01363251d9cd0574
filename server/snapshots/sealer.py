"""Snapshots outside a server: encrypted, authenticated, bound to an owner, and of limited life.

A sealed snapshot is magic, length of the header (4 bytes, little-endian), header, nonce, ciphertext
of AES-256-GCM. The header may be read by anybody; it is authenticated with the rest.
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
VERSION = 2
"""The format that is written."""
READ_VERSIONS = (2,)
"""The formats that are read: ours, and the one before, once there is one that was released."""

_MAGIC = b"CONCERTINA-SNAP\n"
_NONCE_BYTES = 12
_KEY_BYTES = 32
_MAX_HEADER_BYTES = 65_536


class Sealer:
    """Seals with the first of its keys, and opens with any of them, so that keys can be changed."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._ciphers = [AESGCM(key) for key in keys]
        self.secret = hashlib.sha256(b"names" + keys[0]).digest()

    @staticmethod
    def from_environment() -> Sealer | None:
        """With the keys of CONCERTINA_SNAPSHOT_KEY, separated by commas; None if there are none.

        Raises ConfigError for a key that is none.
        """
        given = os.environ.get(KEY_VARIABLE, "")
        keys = [_key(text.strip()) for text in given.split(",") if text.strip()]
        return Sealer(keys) if keys else None

    @staticmethod
    def for_this_process() -> Sealer:
        """With a key that nobody else has."""
        return Sealer([secrets.token_bytes(_KEY_BYTES)])

    def seal(self, header: pb.SnapshotHeader, snapshot: pb.Snapshot) -> bytes:
        """The snapshot as bytes that may lie anywhere."""
        said = header.SerializeToString(deterministic=True)
        front = _MAGIC + len(said).to_bytes(4, "little") + said
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return front + nonce + self._ciphers[0].encrypt(nonce, snapshot.SerializeToString(), front)

    def open(self, sealed: bytes, owner: str) -> tuple[pb.SnapshotHeader, pb.Snapshot]:
        """Header and snapshot, if they are whole and the owner's.

        Raises SnapshotRefused, which says why.
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
                f"{' and '.join(map(str, READ_VERSIONS))}"
            )
        try:
            for time_of in (header.accepted, header.expires):
                time_of.ToNanoseconds()
            return header, pb.Snapshot.FromString(opened)
        except (DecodeError, ValueError):  # the latter for times that are none
            raise SnapshotRefused("the snapshot was sealed, but nothing that can be read") from None


def refuse_expired(header: pb.SnapshotHeader) -> None:
    """Raise SnapshotRefused when the snapshot is too old."""
    if header.expires.ToNanoseconds() < time.time_ns():
        raise SnapshotRefused(f"the snapshot expired at {header.expires.ToJsonString()}")


def _read_header(sealed: bytes) -> tuple[pb.SnapshotHeader, int]:
    """The header and the number of bytes before the nonce."""
    begin = len(_MAGIC) + 4
    if len(sealed) < begin or not sealed.startswith(_MAGIC):
        raise SnapshotRefused("this is no snapshot of Concertina, or only the beginning of one")
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
