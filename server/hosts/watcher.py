"""Adds, replaces and removes engines while a server runs, as bundles in a directory change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from server.bundles.bundle import Bundle
from server.bundles.scanner import BundleScanner
from server.config import ServeConfig
from server.engine.engine import Engine
from server.sessions.registry import hand_over
from server.snapshots.snapshots import Keeper

_log = logging.getLogger(__name__)
_POLL_S = 0.1


@dataclass(frozen=True)
class _Change:
    """Result of one scan of the directory.

    folders: the folder of every model to serve. opened: new engines, by model name.
    """

    folders: Mapping[str, Path]
    opened: Mapping[str, Engine] = field(default_factory=dict)


class Watcher:
    """Opens an engine for every complete bundle in `config.watch`; closes it if the bundle is gone.

    engines: the engines that get new streams, by model name.
    draining: the engines that get no new streams and finish their running ones.

    Only this class changes the two, on the event loop; slow work runs on another thread. If a new
    bundle cannot be used, the model is served as before. Without `config.watch`, nothing changes.
    """

    def __init__(
        self,
        config: ServeConfig,
        engines: dict[str, Engine],
        keeper: Keeper | None,
        period_s: float = 1.0,
    ) -> None:
        self.engines = engines
        self.draining: set[Engine] = set()
        self._directory = config.watch
        self._config = config.engine
        self._drain_s = config.drain_seconds
        self._keeper = keeper
        self._period_s = period_s
        self._folders: Mapping[str, Path] = {}
        self._unusable: dict[Path, Bundle] = {}  # no engine could be opened for these
        self._duplicates: dict[Path, Bundle] = {}  # these have the name of another bundle
        self._is_readable = True
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._drains: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Load the bundles that are there now (this blocks), then watch on the event loop."""
        if self._directory is not None:
            scanner = BundleScanner(self._directory)
            self._apply(self._scan(scanner))
            self._task = asyncio.create_task(self._watch(scanner))

    async def stop(self) -> None:
        """Stop watching. All engines stay open, also those that drain."""
        self._stopping.set()
        if self._task is not None:
            await self._task
        for drain in self._drains:
            drain.cancel()
        await asyncio.gather(*self._drains, return_exceptions=True)

    def close(self) -> None:
        """Close every engine."""
        for engine in self.running:
            engine.close()

    @property
    def running(self) -> list[Engine]:
        """Every engine that has not been closed."""
        return [*self.engines.values(), *self.draining]

    async def _watch(self, scanner: BundleScanner) -> None:
        while not await self._has_stopped():
            try:
                self._apply(await asyncio.to_thread(self._scan, scanner))
            except Exception:
                _log.exception("scanning %s failed", self._directory)

    async def _has_stopped(self) -> bool:
        """Wait until the next scan is due; True if `stop` was called before."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), self._period_s)
        return self._stopping.is_set()

    # ---- on another thread

    def _scan(self, scanner: BundleScanner) -> _Change:
        try:
            found = scanner.scan()
        except OSError as error:
            if self._is_readable:
                _log.error("cannot read %s, the models stay unchanged: %s", self._directory, error)
            self._is_readable = False
            return _Change(self._folders)
        self._is_readable = True
        wanted = self._wanted(found)
        folders = {name: bundle.folder for name, bundle in wanted.items()}
        return _Change(folders, self._opened(wanted))

    def _wanted(self, found: Mapping[Path, Bundle]) -> dict[str, Bundle]:
        """Bundles by name. If two have the same name, the one that is already served wins."""
        bundles = sorted(
            found.values(), key=lambda b: (self._folders.get(b.name) != b.folder, b.folder)
        )
        wanted: dict[str, Bundle] = {}
        for bundle in bundles:
            first = wanted.setdefault(bundle.name, bundle)
            if first is not bundle and self._duplicates.get(bundle.folder) is not bundle:
                self._duplicates[bundle.folder] = bundle
                folder, name = bundle.folder, bundle.name
                _log.error("not served: %s has the name %r of %s", folder, name, first.folder)
        return wanted

    def _opened(self, wanted: Mapping[str, Bundle]) -> dict[str, Engine]:
        opened: dict[str, Engine] = {}
        for name, bundle in wanted.items():
            running = self.engines.get(name)
            if running is not None and _is_same(running.bundle, bundle):
                continue
            if self._stopping.is_set() or self._unusable.get(bundle.folder) is bundle:
                continue
            try:
                opened[name] = Engine(bundle, self._config, self._keeper)
            except Exception:
                _log.exception("not served: %s cannot be loaded", bundle.folder)
                self._unusable[bundle.folder] = bundle
        return opened

    # ---- on the event loop

    def _apply(self, change: _Change) -> None:
        self._folders = change.folders
        for name, engine in change.opened.items():
            _log.info("serving %s from %s", _title(engine.bundle), engine.bundle.folder)
            if name in self.engines:
                self._retire(self.engines[name])
            self.engines[name] = engine
        for name in self.engines.keys() - change.folders.keys():
            self._retire(self.engines.pop(name))

    def _retire(self, engine: Engine) -> None:
        _log.info("draining %s; its streams have %g s to end", _title(engine.bundle), self._drain_s)
        self.draining.add(engine)
        drain = asyncio.create_task(self._drain(engine))
        self._drains.add(drain)
        drain.add_done_callback(self._drains.discard)

    async def _drain(self, engine: Engine) -> None:
        """Close an engine when it holds no session any more, or after `drain_seconds`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s):
                while engine.holds_sessions:
                    await asyncio.sleep(_POLL_S)
        await hand_over([engine], self._keeper)
        await asyncio.to_thread(engine.close)
        self.draining.discard(engine)
        _log.info("closed %s", _title(engine.bundle))


def _is_same(one: Bundle, other: Bundle) -> bool:
    return bool(one.manifest.fingerprint == other.manifest.fingerprint)


def _title(bundle: Bundle) -> str:
    return f"{bundle.name} {bundle.manifest.fingerprint[:16]}"
