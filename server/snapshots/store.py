"""Stores snapshots in a folder per owner and stream, behind a URI that fsspec understands."""

from __future__ import annotations

import errno
import hashlib
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import ClassVar, TypeVar

from fsspec.utils import get_protocol

from server.snapshots.backends import open_backend
from server.snapshots.limited_calls import LimitedCalls

_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_CALLS = 8
_READS = 4  # at once for one stream
_SLOWEST_BYTES_S = 2_000_000  # a large object may take longer
_SWEEPS, _PROBES = ".sweeps", ".probes"

_NO_NAMES: Mapping[str, float] = {}

_T = TypeVar("_T")


class Store:
    """Reads and writes whole objects by name; what is read is an old one or a new one, whole.

    May be used from several threads. Raises OSError where the storage fails, TimeoutError where it
    does not answer.
    """

    time_limit_s: ClassVar[float] = 10.0
    """Time for one operation; more for a large object."""
    sweep_limit_s: ClassVar[float] = 600.0
    """Time to sweep all."""

    def __init__(self, uri: str) -> None:
        """Raises ConfigError where `uri` is of a kind that cannot be used."""
        self.backend, self._root = open_backend(uri)
        self.is_shared: bool = get_protocol(uri) != "memory"
        self._calls = LimitedCalls(_CALLS)
        self._sweeping = LimitedCalls(1)
        self._creating: set[str] = set()
        self._left: set[str] = set()  # created by calls that were given up; not taken back yet

    def create(
        self,
        owner: str,
        stream_id: str,
        name: str,
        content: bytes,
        stays: Callable[[set[str]], bool] = lambda names: False,
    ) -> None:
        """Store `content` under a name that is free; of several who try, one succeeds.

        No two may have the same content. What is created after all, when we have given it up, is
        taken back, unless it `stays` with the names of what is stored of the stream by then. Raises
        FileExistsError.
        """
        folder = self._folder(owner, stream_id)
        self._create(f"{folder}/{name}", content, lambda: stays(set(self.backend.names(folder))))

    def names(self, owner: str, stream_id: str) -> set[str]:
        """Names of all that is stored of a stream."""
        try:
            folder = self._folder(owner, stream_id)
        except FileNotFoundError:
            return set()
        return set(self._read(lambda: self.backend.names(folder)))

    def get(self, owner: str, stream_id: str, names: Iterable[str]) -> dict[str, bytes]:
        """What is stored of a stream under these names, as far as it is there."""
        folder = self._folder(owner, stream_id)

        def get(name: str) -> tuple[str, bytes] | None:
            with suppress(FileNotFoundError):  # it was deleted meanwhile
                return name, self.backend.read(f"{folder}/{name}")
            return None

        found, rest = [], [partial(get, name) for name in names]
        while rest:
            found += self._checked(lambda: self._calls.call_all(self.time_limit_s, rest[:_READS]))
            del rest[:_READS]
        return dict(each for each in found if each is not None)

    def remove(self, owner: str, stream_id: str, names: Iterable[str]) -> None:
        """Drop what is stored of a stream under these names."""
        paths = [f"{self._folder(owner, stream_id)}/{name}" for name in names]

        def remove() -> None:
            for path in paths:
                self.backend.remove(path)

        self._read(remove)

    def delete(self, owner: str, stream_id: str, keep: str = "") -> None:
        """Drop all that is stored of a stream, but for the object with the name `keep`."""
        with suppress(FileNotFoundError):
            folder = self._folder(owner, stream_id)
            self._read(lambda: self.backend.clear(folder, keep))

    def streams(self, owner: str, wanted: Callable[[set[str]], bool]) -> list[str]:
        """Streams of an owner of which the names of what is stored are `wanted`."""
        folder = f"{self._root}/{_anonymous(owner)}"

        def streams() -> list[str]:
            return [
                stream.rpartition("/")[2]
                for stream, found in groupby(self.backend.find(folder), _folder_of)
                if wanted({path.rpartition("/")[2] for path, _ in found})
            ]

        return self._read(streams)

    def probe(self) -> None:
        """Create, read and drop a small object. Raises OSError where that does not work."""
        path, content = f"{self._root}/{_PROBES}/{secrets.token_hex(8)}", secrets.token_bytes(16)
        self._create(path, content)
        try:
            if self._read(lambda: self.backend.read(path)) != content:
                raise OSError(errno.EIO, "what is read is not what was written")
            with suppress(FileExistsError):
                self._create(path, content[::-1])
                raise OSError(errno.ENOTSUP, "it creates an object that is there already")
        finally:
            self._read(lambda: self.backend.remove(path))

    def begin_sweep(self, period: int) -> bool:
        """Whether we sweep in this period; of all who ask, one does."""
        try:
            self._create(f"{self._root}/{_SWEEPS}/{period}", secrets.token_bytes(16))
        except FileExistsError:
            return False
        return True

    def sweep(self, older_than_s: float, kept_s: Mapping[str, float] = _NO_NAMES) -> int:
        """Drop the streams of which nothing was written for so long; how many.

        kept_s: names with which a stream stays for so many seconds more.
        """
        return self._sweeping.call(self.sweep_limit_s, lambda: self._sweep(older_than_s, kept_s))

    def _sweep(self, older_than_s: float, kept_s: Mapping[str, float]) -> int:
        before, swept = time.time() - older_than_s, 0
        for folder, group in groupby(self.backend.find(self._root), _folder_of):
            found = dict(group)
            if folder.endswith((_SWEEPS, _PROBES)):
                for path in [path for path, at in found.items() if at < before]:
                    self.backend.remove(path)
                continue
            more_s = max(kept_s.get(path.rpartition("/")[2], 0.0) for path in found)
            if max(found.values()) < before - more_s and not self._is_new(folder, before):
                self.backend.clear(folder)
                swept += 1
        return swept

    def _is_new(self, folder: str, before: float) -> bool:
        """Whether something was written in a folder after all, while others were looked at."""
        return any(at >= before for _, at in self.backend.find(folder))

    def _create(self, path: str, content: bytes, stays: Callable[[], bool] = lambda: False) -> None:
        """Create an object. Until a call that is given up has ended, none begins there."""
        if path in self._creating:
            raise OSError(errno.EBUSY, "an earlier call that creates the object has not ended")
        if path in self._left:
            self._read(lambda: self.backend.remove(path))
            self._left.discard(path)

        def create() -> None:
            self._creating.add(path)
            try:
                self.backend.create(path, content)
            except BaseException:
                self._creating.discard(path)
                raise

        def late() -> None:
            self._left.add(path)
            try:
                if not stays():
                    self.backend.remove(path)
                self._left.discard(path)
            finally:
                self._creating.discard(path)

        self._write(create, len(content), late)
        self._creating.discard(path)

    def _write(
        self, write: Callable[[], None], size: int, late: Callable[[], None] | None = None
    ) -> None:
        try:
            self._call(self.time_limit_s + size / _SLOWEST_BYTES_S, write, late)
        except FileNotFoundError as error:  # such as a bucket
            raise OSError(errno.EIO, f"the store is not there: {error}") from error

    def _read(self, read: Callable[[], _T]) -> _T:
        return self._call(self.time_limit_s, read)

    def _call(
        self, limit_s: float, function: Callable[[], _T], late: Callable[[], None] | None = None
    ) -> _T:
        return self._checked(lambda: self._calls.call(limit_s, function, late))

    def _checked(self, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except OSError:
            raise
        except Exception as error:  # botocore's, say, where there are no credentials
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error

    def _folder(self, owner: str, stream_id: str) -> str:
        if not _NAME.fullmatch(stream_id):
            raise FileNotFoundError(stream_id)
        return f"{self._root}/{_anonymous(owner)}/{stream_id}"


def _folder_of(found: tuple[str, float]) -> str:
    return found[0].rpartition("/")[0]


def _anonymous(owner: str) -> str:
    """Folder of an owner: a hash, so that no path has the name of a key."""
    return hashlib.sha256(owner.encode()).hexdigest()[:32]
