"""Stores snapshots in a folder per owner and stream, behind a URI that fsspec understands."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from contextlib import suppress

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

from server.config import ConfigError

_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")


class Store:
    """Reads and writes snapshots by name. A reader gets the old or the new one, never a part.

    is_shared: whether other processes can reach it. Thread-safe. Methods raise OSError if the
    storage fails.
    """

    def __init__(self, uri: str) -> None:
        """Raises ConfigError if no installed package can open `uri`."""
        try:
            self._files, root = fsspec.url_to_fs(uri, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"snapshots is {uri!r}, which cannot be opened: {error}") from None
        self._root = root.rstrip("/")
        self.is_shared: bool = get_protocol(uri) != "memory"

    def put(self, owner: str, stream_id: str, name: str, content: bytes) -> None:
        """Store `content` under `name`, in place of any former content."""
        path = f"{self._folder(owner, stream_id)}/{name}"
        if not isinstance(self._files, LocalFileSystem):
            self._files.pipe_file(path, content)
            return
        self._files.makedirs(os.path.dirname(path), exist_ok=True)
        part = f"{path}.{secrets.token_hex(4)}.part"
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def get(self, owner: str, stream_id: str) -> dict[str, bytes]:
        """All snapshots of a stream by name; empty if there are none."""
        try:
            folder = self._folder(owner, stream_id)
            paths = [p for p in self._files.ls(folder, detail=False) if not p.endswith(".part")]
            return {path.rpartition("/")[2]: self._files.cat_file(path) for path in paths}
        except FileNotFoundError:  # there are none, or another process has deleted them
            return {}

    def delete(self, owner: str, stream_id: str) -> None:
        """Delete all snapshots of a stream."""
        with suppress(FileNotFoundError):
            self._files.rm(self._folder(owner, stream_id), recursive=True)

    def streams(self, owner: str) -> list[str]:
        """Names of the owner's stored streams, in order."""
        try:
            paths = self._files.ls(f"{self._root}/{_anonymous(owner)}", detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def sweep(self, older_than_s: float) -> int:
        """Delete streams without a write for `older_than_s` seconds. Returns how many."""
        written: dict[str, float] = {}
        for path in self._files.find(self._root):
            with suppress(FileNotFoundError):
                at, folder = self._files.modified(path).timestamp(), path.rpartition("/")[0]
                written[folder] = max(at, written.get(folder, 0.0))
        old = [folder for folder, at in written.items() if at < time.time() - older_than_s]
        for folder in old:
            with suppress(FileNotFoundError):
                self._files.rm(folder, recursive=True)
        return len(old)

    def _folder(self, owner: str, stream_id: str) -> str:
        if not _NAME.fullmatch(stream_id):
            raise FileNotFoundError(stream_id)
        return f"{self._root}/{_anonymous(owner)}/{stream_id}"


def _anonymous(owner: str) -> str:
    """Folder of an owner: a hash, so that no path has the name of a key."""
    return hashlib.sha256(owner.encode()).hexdigest()[:32]
