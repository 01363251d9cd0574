"""Finds the bundles in a directory. Scans often, but reads a bundle only after a change."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from concertina.bundle.manifest import MANIFEST
from server.bundles.bundle import Bundle, load_bundle
from server.errors import BundleError

_log = logging.getLogger(__name__)

Stamp = frozenset[tuple[str, int, int, int]]
"""Name, size, modification time in ns and inode of every file; empty if there is no bundle."""


@dataclass
class _Folder:
    """What is known about one folder.

    stamp: at the last scan. examined: when it was last verified. bundle: the last valid one in it.
    """

    stamp: Stamp | None = None
    examined: Stamp = frozenset()
    bundle: Bundle | None = None


class BundleScanner:
    """Scans the folders of one directory, except those whose names begin with a dot.

    A change counts when two scans in a row find the same files. So a bundle that is still being
    copied is not read, and a bundle whose folder is renamed never disappears.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._folders: dict[Path, _Folder] = {}
        self._has_scanned = False

    def scan(self) -> dict[Path, Bundle]:
        """The last valid bundle of every folder that has a manifest.

        The first scan accepts what it finds at once. For a damaged bundle, the reason is logged
        once. Raises OSError if the directory cannot be read.
        """
        there = {path for path in self._directory.iterdir() if not path.name.startswith(".")}
        for path in sorted(there | self._folders.keys()):
            folder = self._folders.setdefault(path, _Folder())
            stamp = _stamp(path)
            settled = stamp == folder.stamp or not self._has_scanned
            folder.stamp = stamp
            if settled and not stamp:
                del self._folders[path]
            elif settled and stamp != folder.examined:
                folder.examined = stamp
                try:
                    folder.bundle = load_bundle(path)
                except BundleError as error:
                    _log.error("not served: %s", error)
        self._has_scanned = True
        return {path: f.bundle for path, f in self._folders.items() if f.bundle is not None}


def _stamp(folder: Path) -> Stamp:
    try:
        if not (folder / MANIFEST).exists():
            return frozenset()
        files = [(path.name, path.stat()) for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):  # just being removed, or not a folder
        return frozenset()
    return frozenset((name, f.st_size, f.st_mtime_ns, f.st_ino) for name, f in files)
