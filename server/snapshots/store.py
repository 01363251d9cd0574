"""Stores snapshots in a folder per owner and stream, behind a URI that fsspec understands."""

from __future__ import annotations

import errno
import hashlib
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, TypeVar

from fsspec.utils import get_protocol

from server.snapshots.backends import open_backend
from server.snapshots.limited_calls import LimitedCalls

_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_CALLS = 8
_SLOWEST_BYTES_S = 2_000_000  # a large object may take longer
_SWEEPS, _PROBES = ".sweeps", ".probes"

_T = TypeVar("_T")


@dataclass
class _Flight:
    """Writes to one path that have not ended, and what the last call wants there; None: nothing."""

    puts: int = 0
    wanted: bytes | None = None


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
        self._flights: dict[str, _Flight] = {}
        self._creating: set[str] = set()
        self._left: set[str] = set()  # created by calls that were given up; not taken back yet
        self._lock = threading.Lock()

    def put(self, owner: str, stream_id: str, name: str, content: bytes) -> None:
        """Store `content` under `name`, in place of any former content."""
        path = f"{self._folder(owner, stream_id)}/{name}"
        self._write(lambda: self._put(path, content), len(content))

    def create(self, owner: str, stream_id: str, name: str, content: bytes) -> None:
        """Store `content` under a name that is free; of several who try, one succeeds.

        No two may have the same content. Raises FileExistsError.
        """
        self._create(f"{self._folder(owner, stream_id)}/{name}", content)

    def names(self, owner: str, stream_id: str) -> set[str]:
        """Names of all that is stored of a stream."""
        try:
            folder = self._folder(owner, stream_id)
        except FileNotFoundError:
            return set()
        return set(self._read(lambda: self.backend.names(folder)))

    def get(self, owner: str, stream_id: str, names: Iterable[str]) -> dict[str, bytes]:
        """What is stored of a stream under these names, as far as it is there."""
        found = {}
        for name in names:
            path = f"{self._folder(owner, stream_id)}/{name}"
            with suppress(FileNotFoundError):  # it was deleted meanwhile
                found[name] = self._read(partial(self.backend.read, path))
        return found

    def remove(self, owner: str, stream_id: str, names: Iterable[str]) -> None:
        """Drop what is stored of a stream under these names."""
        paths = [f"{self._folder(owner, stream_id)}/{name}" for name in names]
        self._want_nothing(paths)

        def remove() -> None:
            for path in paths:
                self.backend.remove(path)

        self._read(remove)

    def delete(self, owner: str, stream_id: str, keep: str = "") -> None:
        """Drop all that is stored of a stream, but for the object with the name `keep`."""
        with suppress(FileNotFoundError):
            folder = self._folder(owner, stream_id)
            others = [path for path in [*self._flights] if path != f"{folder}/{keep}"]
            self._want_nothing(path for path in others if path.startswith(f"{folder}/"))
            self._read(lambda: self.backend.clear(folder, keep))

    def streams(self, owner: str) -> dict[str, set[str]]:
        """Of each stream of an owner the names of what is stored of it."""
        folder = f"{self._root}/{_anonymous(owner)}"
        found: dict[str, set[str]] = {}
        for path in self._read(lambda: self.backend.find(folder)):
            stream, _, name = path.rpartition("/")
            found.setdefault(stream.rpartition("/")[2], set()).add(name)
        return found

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

    def sweep(self, older_than_s: float) -> int:
        """Drop the streams of which nothing was written for so long; how many."""
        return self._sweeping.call(self.sweep_limit_s, lambda: self._sweep(older_than_s))

    def _sweep(self, older_than_s: float) -> int:
        written: dict[str, float] = {}
        before = time.time() - older_than_s
        for path, at in self.backend.find(self._root).items():
            folder = path.rpartition("/")[0]
            if folder.endswith((_SWEEPS, _PROBES)):
                if at < before:
                    self.backend.remove(path)
            else:
                written[folder] = max(at, written.get(folder, 0.0))
        old = [folder for folder, at in written.items() if at < before]
        for folder in old:
            self.backend.clear(folder)
        return len(old)

    def _put(self, path: str, content: bytes) -> None:
        """Store `content`, unless a later call wants something else there when that is done.

        A write that hung may come to its end after a later one, or after the object was dropped.
        """
        with self._lock:
            flight = self._flights.setdefault(path, _Flight())
            flight.puts += 1
            flight.wanted = content
        try:
            self.backend.put(path, content)
            while (wanted := flight.wanted) is not content:
                if wanted is None:
                    self.backend.remove(path)
                    break
                content = wanted
                self.backend.put(path, content)
        finally:
            with self._lock:
                flight.puts -= 1
                if not flight.puts:
                    del self._flights[path]

    def _want_nothing(self, paths: Iterable[str]) -> None:
        """That nothing lies at `paths` when the writes that are under way there have ended."""
        with self._lock:
            for path in paths:
                if (flight := self._flights.get(path)) is not None:
                    flight.wanted = None

    def _create(self, path: str, content: bytes) -> None:
        """Create an object. One that is given up is taken back; until then, none begins there."""
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

        def take_back() -> None:
            self._left.add(path)
            try:
                self.backend.remove(path)
                self._left.discard(path)
            finally:
                self._creating.discard(path)

        self._write(create, len(content), take_back)
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
        try:
            return self._calls.call(limit_s, function, late)
        except OSError:
            raise
        except Exception as error:  # botocore's, say, where there are no credentials
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error

    def _folder(self, owner: str, stream_id: str) -> str:
        if not _NAME.fullmatch(stream_id):
            raise FileNotFoundError(stream_id)
        return f"{self._root}/{_anonymous(owner)}/{stream_id}"


def _anonymous(owner: str) -> str:
    """Folder of an owner: a hash, so that no path has the name of a key."""
    return hashlib.sha256(owner.encode()).hexdigest()[:32]
