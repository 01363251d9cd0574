"""Which bundles lie in a directory: looked at often, read only when something changed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from concertina.bundle.manifest import MANIFEST
from server.bundles.bundle import Bundle, load_bundle
from server.errors import BundleError

_log = logging.getLogger(__name__)

Stamp = frozenset[tuple[str, int, int, int]]
"""Name, bytes, time of change in ns and inode of every file; empty where no bundle is."""


@dataclass
class _Folder:
    """What is known of one.

    stamp: at the last look. examined: of what was verified last. bundle: the last whole one in it.
    """

    stamp: Stamp | None = None
    examined: Stamp = frozenset()
    bundle: Bundle | None = None


class Survey:
    """Looks at the folders of one directory; those whose names begin with a dot are left out.

    What changed counts once two looks in a row found it the same: a bundle that is being copied is
    not read, and one whose folder gets another name is never gone.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._folders: dict[Path, _Folder] = {}
        self._has_looked = False

    def look(self) -> dict[Path, Bundle]:
        """The last whole bundle of every folder that has a manifest.

        The very first look takes what it sees.

        Of a bundle that is damaged the reason is logged, once. Raises OSError when the directory
        cannot be read.
        """
        there = {path for path in self._directory.iterdir() if not path.name.startswith(".")}
        for path in sorted(there | self._folders.keys()):
            folder = self._folders.setdefault(path, _Folder())
            stamp = _stamp(path)
            settled = stamp == folder.stamp or not self._has_looked
            folder.stamp = stamp
            if settled and not stamp:
                del self._folders[path]
            elif settled and stamp != folder.examined:
                folder.examined = stamp
                try:
                    folder.bundle = load_bundle(path)
                except BundleError as error:
                    _log.error("not taken: %s", error)
        self._has_looked = True
        return {path: f.bundle for path, f in self._folders.items() if f.bundle is not None}


def _stamp(folder: Path) -> Stamp:
    try:
        if not (folder / MANIFEST).exists():
            return frozenset()
        files = [(path.name, path.stat()) for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):  # it is going just now, or no folder at all
        return frozenset()
    return frozenset((name, f.st_size, f.st_mtime_ns, f.st_ino) for name, f in files)
