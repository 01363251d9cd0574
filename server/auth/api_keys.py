"""API keys: the file that holds them, and finding the caller of a call.

The file has the plain SHA-256 of each secret. A slow, salted hash protects passwords, which can be
guessed. A secret of 256 random bits cannot be guessed from its digest, and a slow hash before every
call would make it easy to overload the server.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from server.auth.file_stamp import stamp
from server.errors import KeysError, Unauthenticated

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PREFIX: Final = "concertina-"  # lets secret scanners recognise leaked keys
_SECRET_BYTES: Final = 32
_FIELDS: Final = {"name", "sha256", "models", "max_streams"}
_HEADER: Final = "authorization"
_SCHEME: Final = "bearer "

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """The owner of an API key, and what they may do."""

    name: str
    """Name of the key; empty on a server without keys."""

    models: tuple[str, ...] | None = None
    """Models that the caller may use; None for all."""

    max_streams: int | None = None
    """Most streams that the caller may have in one replica at the same time; None for no limit."""

    def may_use(self, model: str) -> bool:
        """Whether the caller may see and use the model of this name."""
        return self.models is None or model in self.models


ANYONE: Final = Caller("")


@dataclass(frozen=True)
class Key:
    """An API key as it is stored: its caller, and the SHA-256 of its secret."""

    caller: Caller
    digest: bytes


def new_key(caller: Caller) -> tuple[Key, str]:
    """A new key for `caller`, and its secret, which is not stored. Raises KeysError."""
    _check(caller)
    secret = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    return Key(caller, _digest(secret)), secret


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys in a file. Raises KeysError, which names the file and the problem."""
    try:
        content = json.loads(path.read_bytes())
        keys = tuple(_key(**entry) for entry in content["keys"])
    except FileNotFoundError:
        remedy = f"`concertina keys add NAME --keys {path}` creates it"
        raise KeysError(f"{path} does not exist: {remedy}") from None
    except OSError as error:
        raise KeysError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise KeysError(f"{path} is not a keys file: {error}") from None
    names = [key.caller.name for key in keys]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise KeysError(f"{path} has several keys named {', '.join(repeated)}")
    return keys


def write_keys(path: Path, keys: Sequence[Key]) -> None:
    """Replace the file atomically; only its owner can read it."""
    entries = [_entry(key) for key in keys]
    text = json.dumps({"keys": entries}, indent=2) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


class Callers:
    """Finds the caller of each call. Without a keys file, the caller is always ANYONE.

    The file is read again when it changes. If that fails, the old keys stay valid.
    """

    def __init__(self, path: Path | None) -> None:
        """Raises KeysError if the file cannot be read."""
        self._path = path
        self._stamp = None if path is None else stamp(path)
        self._keys = () if path is None else read_keys(path)

    def of(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Who made the call that carried this `metadata`. Raises Unauthenticated."""
        if self._path is None:
            return ANYONE
        self._refresh(self._path)
        given = [value for key, value in metadata if key == _HEADER]
        if len(given) != 1 or not str(given[0]).lower().startswith(_SCHEME):
            raise Unauthenticated(
                "this server needs an API key: send metadata `authorization: Bearer KEY` once"
            )
        digest = _digest(str(given[0])[len(_SCHEME) :].strip())
        found = None
        for key in self._keys:  # compare with all keys, so that the time reveals nothing
            if hmac.compare_digest(key.digest, digest):
                found = key.caller
        if found is None:
            raise Unauthenticated("this server does not know the API key; ask for a new one")
        return found

    def _refresh(self, path: Path) -> None:
        if (now := stamp(path)) == self._stamp:
            return
        self._stamp = now
        try:
            self._keys = read_keys(path)
        except KeysError as error:
            _log.error("keeping the old keys: %s", error)
        else:
            _log.info("read %d keys from %s", len(self._keys), path)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="replace")).digest()


def _key(**entry: Any) -> Key:
    if unknown := sorted(entry.keys() - _FIELDS):
        raise ValueError(f"unknown field {', '.join(unknown)}")
    models = entry.get("models")
    if models is not None and not isinstance(models, list):
        raise ValueError(f"models is {models!r}: it must be a list of names")
    allowed = None if models is None else tuple(models)
    caller = Caller(entry["name"], allowed, entry.get("max_streams"))
    _check(caller)
    digest = bytes.fromhex(entry["sha256"])
    if len(digest) != hashlib.sha256().digest_size:
        raise ValueError(f"sha256 of {caller.name} has {len(digest)} bytes")
    return Key(caller, digest)


def _entry(key: Key) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": key.caller.name, "sha256": key.digest.hex()}
    if key.caller.models is not None:
        entry["models"] = key.caller.models
    if key.caller.max_streams is not None:
        entry["max_streams"] = key.caller.max_streams
    return entry


def _check(caller: Caller) -> None:
    """Raises KeysError if a field of `caller` is invalid."""
    if not isinstance(caller.name, str) or not _NAME.fullmatch(caller.name):
        raise KeysError(
            f"{caller.name!r} is not a valid key name: use up to 64 letters, digits, '.', '_' and "
            "'-', beginning with a letter or digit"
        )
    if any(not isinstance(model, str) for model in caller.models or ()):
        raise KeysError(f"models of {caller.name} is {caller.models!r}: it must be a list of names")
    limit = caller.max_streams
    if limit is not None and (type(limit) is not int or limit < 1):
        raise KeysError(f"max_streams of {caller.name} is {limit!r}: it must be at least 1")
