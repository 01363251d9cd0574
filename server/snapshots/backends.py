"""Where objects lie: in files, in S3, or in the memory of this process.

Each back end can create an object that nobody else has created, whole or not at all. A server
claims a stream in this way, so that no other back end will do.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

import fsspec
from fsspec.utils import get_protocol

from server.config import ConfigError

_PART = ".part"
_CONFLICTS = 5  # so often others may be in the way of a create
_TIMES = ("mtime", "LastModified", "created")
_memory = threading.Lock()  # fsspec's memory is one for the whole process


class Backend:
    """Objects by path. A reader sees an old object or a new one, whole.

    May be used from several threads. Raises OSError, or what the back end raises.
    """

    def __init__(self, files: Any) -> None:
        self._files = files

    def create(self, path: str, content: bytes) -> None:
        """Store `content` where nothing lies. Raises FileExistsError."""
        raise NotImplementedError

    def read(self, path: str) -> bytes:
        """The object at `path`. Raises FileNotFoundError."""
        content: bytes = self._files.cat_file(path)
        return content

    def names(self, folder: str) -> list[str]:
        """Names of the objects in a folder; none where there is no folder."""
        try:
            paths = self._files.ls(folder, detail=False)
        except FileNotFoundError:
            return []
        return [path.rpartition("/")[2] for path in paths if not path.endswith(_PART)]

    def find(self, folder: str) -> Iterator[tuple[str, float]]:
        """Paths of all that is stored in a folder and below, and when it was written.

        What lies in one folder comes together.
        """
        for path, info in self._files.find(folder, detail=True).items():
            yield path, _written(info)

    def remove(self, path: str) -> None:
        """Drop the object at `path`, if it is there."""
        with suppress(FileNotFoundError):
            self._files.rm_file(path)

    def clear(self, folder: str, keep: str = "") -> None:
        """Drop all that lies in a folder, but for the object with the name `keep`."""
        with suppress(FileNotFoundError):
            if not keep:
                self._files.rm(folder, recursive=True)
                return
            for path in self._files.ls(folder, detail=False):
                if path.rpartition("/")[2] != keep:
                    self.remove(path)


class Files(Backend):
    """A file system that all servers share."""

    def create(self, path: str, content: bytes) -> None:
        for tries in range(_CONFLICTS):
            try:
                with _part(path, content) as part:
                    os.link(part, path)
                break
            except FileNotFoundError:  # a delete took the part, or the folder
                if tries == _CONFLICTS - 1:
                    raise
        folder = os.path.dirname(path)
        _sync(folder)
        _sync(os.path.dirname(folder))

    def find(self, folder: str) -> Iterator[tuple[str, float]]:
        return _files(folder)  # fsspec would hold all of them in memory at once


class Memory(Backend):
    """The memory of this process, for tests, and for Pause and Fork without a store."""

    def create(self, path: str, content: bytes) -> None:
        with _memory:
            if self._files.exists(path):
                raise FileExistsError(path)
            self._files.pipe_file(path, content)


class Objects(Backend):
    """S3, or what speaks as S3 does, with conditional writes."""

    def create(self, path: str, content: bytes) -> None:
        for _ in range(_CONFLICTS):
            try:
                self._files.pipe_file(path, content, mode="create")
                return
            except OSError as error:
                refused = _refusal(error)
                if refused == "ConditionalRequestConflict":
                    continue
                if refused != "PreconditionFailed" and not isinstance(error, FileExistsError):
                    raise
                # A request whose answer got lost is sent again: what is there may be ours.
                with suppress(FileNotFoundError):
                    if self.read(path) == content:
                        return
                raise FileExistsError(path) from None
        raise OSError(errno.EBUSY, "others create the same object", path)


_KINDS = {"file": Files, "local": Files, "memory": Memory, "s3": Objects, "s3a": Objects}


def open_backend(uri: str) -> tuple[Backend, str]:
    """The back end of a URI in fsspec's form, and the folder there.

    Raises ConfigError where nothing installed here can reach it, or it cannot create exclusively.
    """
    if (kind := _KINDS.get(get_protocol(uri))) is None:
        raise ConfigError(
            f"snapshots is {uri!r}, which cannot be used: streams lie where an object can be "
            "created that nobody else created, which are file:// (a file system that all servers "
            "share), s3:// and memory://"
        )
    try:
        files, root = fsspec.url_to_fs(uri, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"snapshots is {uri!r}, which cannot be opened: {error}") from None
    return kind(files), root.rstrip("/")


@contextmanager
def _part(path: str, content: bytes) -> Iterator[str]:
    """A file beside `path` with `content`, on the disk; gone afterwards."""
    part = f"{path}.{secrets.token_hex(4)}{_PART}"
    try:
        _write(part, content)
    except FileNotFoundError:  # the folder is new, or was swept meanwhile
        os.makedirs(os.path.dirname(path), exist_ok=True)
        _write(part, content)
    try:
        yield part
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)


def _write(path: str, content: bytes) -> None:
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except FileNotFoundError:
        raise
    except OSError:
        with suppress(OSError):  # the disk is full, say
            os.unlink(path)
        raise


def _files(folder: str) -> Iterator[tuple[str, float]]:
    """Paths of the files in a folder and below, and when they were written."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path)
                continue
            with suppress(FileNotFoundError):
                yield entry.path, entry.stat(follow_symlinks=False).st_mtime


def _sync(folder: str) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _refusal(error: OSError) -> str:
    """S3's code of an error."""
    response = getattr(error.__cause__, "response", None) or {}
    code: str = response.get("Error", {}).get("Code", "")
    return {"412": "PreconditionFailed", "409": "ConditionalRequestConflict"}.get(code, code)


def _written(info: dict[str, Any]) -> float:
    """When an object was written, in seconds of Unix time."""
    at = next(info[key] for key in _TIMES if key in info)
    return at.timestamp() if isinstance(at, datetime) else float(at)
