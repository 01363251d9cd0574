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
from server.sessions.registry import hand_over
from server.sessions.served_model import ServedModel
from server.snapshots.writer import SnapshotWriter

_log = logging.getLogger(__name__)
_POLL_S = 0.1


@dataclass(frozen=True)
class _Change:
    """Result of one scan of the directory.

    folders: the folder of every model to serve. opened: new engines, by model name.
    """

    folders: Mapping[str, Path]
    opened: Mapping[str, ServedModel] = field(default_factory=dict)


class Watcher:
    """Opens an engine for every complete bundle in `config.watch`; closes it if the bundle is gone.

    models: those that get new streams, by name.
    draining: those that get no new streams and finish their running ones.

    Only this class changes the two, on the event loop; slow work runs on another thread. If a new
    bundle cannot be used, the model is served as before. Without `config.watch`, nothing changes.
    """

    def __init__(
        self,
        config: ServeConfig,
        models: dict[str, ServedModel],
        snapshots: SnapshotWriter | None,
        period_s: float = 1.0,
    ) -> None:
        self.models = models
        self.draining: set[ServedModel] = set()
        self._directory = config.watch
        self._config = config.engine
        self._drain_s = config.drain_seconds
        self._snapshots = snapshots
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
        for model in self.running:
            model.close()

    @property
    def running(self) -> list[ServedModel]:
        """Every engine that has not been closed."""
        return [*self.models.values(), *self.draining]

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

    def _opened(self, wanted: Mapping[str, Bundle]) -> dict[str, ServedModel]:
        opened: dict[str, ServedModel] = {}
        for name, bundle in wanted.items():
            running = self.models.get(name)
            if running is not None and _is_same(running.bundle, bundle):
                continue
            if self._stopping.is_set() or self._unusable.get(bundle.folder) is bundle:
                continue
            try:
                opened[name] = ServedModel(bundle, self._config, self._snapshots)
            except Exception:
                _log.exception("not served: %s cannot be loaded", bundle.folder)
                self._unusable[bundle.folder] = bundle
        return opened

    # ---- on the event loop

    def _apply(self, change: _Change) -> None:
        self._folders = change.folders
        for name, model in change.opened.items():
            _log.info("serving %s from %s", _title(model.bundle), model.bundle.folder)
            if name in self.models:
                self._retire(self.models[name])
            self.models[name] = model
        for name in self.models.keys() - change.folders.keys():
            self._retire(self.models.pop(name))

    def _retire(self, model: ServedModel) -> None:
        _log.info("draining %s; its streams have %g s to end", _title(model.bundle), self._drain_s)
        self.draining.add(model)
        drain = asyncio.create_task(self._drain(model))
        self._drains.add(drain)
        drain.add_done_callback(self._drains.discard)

    async def _drain(self, model: ServedModel) -> None:
        """Close a model when it holds no session any more, or after `drain_seconds`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s):
                while model.holds_sessions:
                    await asyncio.sleep(_POLL_S)
        await hand_over([model], self._snapshots)
        await asyncio.to_thread(model.close)
        self.draining.discard(model)
        _log.info("closed %s", _title(model.bundle))


def _is_same(one: Bundle, other: Bundle) -> bool:
    return bool(one.fingerprint == other.fingerprint)


def _title(bundle: Bundle) -> str:
    return f"{bundle.name} {bundle.fingerprint[:16]}"
