"""API keys: the file that holds them, and who is calling.

The file keeps the plain SHA-256 of each secret. A slow, salted hash protects passwords, which can
be guessed; a secret of 256 random bits cannot, so its digest tells nothing, and a slow hash before
every call would only be a way to keep the server busy.
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
_PREFIX: Final = "concertina-"  # by which scanners find secrets that lie where they should not
_SECRET_BYTES: Final = 32
_FIELDS: Final = {"name", "sha256", "models", "max_streams"}
_HEADER: Final = "authorization"
_SCHEME: Final = "bearer "

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """Who calls, and what they may do."""

    name: str
    """Name of the key; empty on a server without keys."""

    models: tuple[str, ...] | None = None
    """Models that the caller may use; None for all."""

    max_streams: int | None = None
    """Streams that the caller may run at once in one replica; None for any number."""

    def may_use(self, model: str) -> bool:
        """Whether the caller may use the model of this name, or learn about it."""
        return self.models is None or model in self.models


ANYONE: Final = Caller("")


@dataclass(frozen=True)
class Key:
    """What is kept of a key: whom it names, and the SHA-256 of its secret."""

    caller: Caller
    digest: bytes


def new_key(caller: Caller) -> tuple[Key, str]:
    """A key for `caller` and its secret, which is kept nowhere. Raises KeysError."""
    _check(caller)
    secret = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    return Key(caller, _digest(secret)), secret


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys in a file. Raises KeysError, which names the file and what is wrong with it."""
    try:
        content = json.loads(path.read_bytes())
        keys = tuple(_key(**entry) for entry in content["keys"])
    except FileNotFoundError:
        remedy = f"`concertina keys add NAME --keys {path}` makes it"
        raise KeysError(f"{path} does not exist: {remedy}") from None
    except OSError as error:
        raise KeysError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise KeysError(f"{path} is not a file of keys: {error}") from None
    names = [key.caller.name for key in keys]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise KeysError(f"{path} has several keys named {', '.join(twice)}")
    return keys


def write_keys(path: Path, keys: Sequence[Key]) -> None:
    """Replace the file in one go, readable by its owner only."""
    entries = [_entry(key) for key in keys]
    text = json.dumps({"keys": entries}, indent=2) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


class Callers:
    """Finds out who calls: anyone, or on a server with keys only who has one.

    The file is read again when it changes. Should that fail, the keys stay as they were.
    """

    def __init__(self, path: Path | None) -> None:
        """Raises KeysError when the file cannot be read."""
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
                "this server wants one API key: metadata `authorization: Bearer KEY`"
            )
        digest = _digest(str(given[0])[len(_SCHEME) :].strip())
        found = None
        for key in self._keys:  # all of them, so that the time tells nothing
            if hmac.compare_digest(key.digest, digest):
                found = key.caller
        if found is None:
            raise Unauthenticated("the API key is not known here; ask for a new one")
        return found

    def _refresh(self, path: Path) -> None:
        if (now := stamp(path)) == self._stamp:
            return
        self._stamp = now
        try:
            self._keys = read_keys(path)
        except KeysError as error:
            _log.error("the keys stay as they were: %s", error)
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
    """Raises KeysError when a name or a number is not one."""
    if not isinstance(caller.name, str) or not _NAME.fullmatch(caller.name):
        raise KeysError(f"{caller.name!r} cannot name a key: use letters, digits, '.', '_' and '-'")
    if any(not isinstance(model, str) for model in caller.models or ()):
        raise KeysError(f"models of {caller.name} are {caller.models!r}: each must be a name")
    limit = caller.max_streams
    if limit is not None and (type(limit) is not int or limit < 1):
        raise KeysError(f"max_streams of {caller.name} is {limit!r}: it must be at least 1")
