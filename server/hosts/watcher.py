"""Bundles come and go while a server runs: its engines follow what lies in a directory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from server.bundles.bundle import Bundle
from server.bundles.scanner import Survey
from server.config import ServeConfig
from server.sessions.registry import hand_over
from server.sessions.served_model import ServedModel
from server.snapshots.writer import SnapshotWriter

_log = logging.getLogger(__name__)
_POLL_S = 0.1


@dataclass(frozen=True)
class _Change:
    """What a look at the directory asks for.

    homes: the folder of every model that stays or comes. opened: engines of those that are new.
    """

    homes: Mapping[str, Path]
    opened: Mapping[str, ServedModel] = field(default_factory=dict)


class Watcher:
    """Opens an engine for every whole bundle in `config.watch`, and closes it when the bundle goes.

    Nobody else changes `models`, nor `leaving`: the engines that are sent nothing new and finish
    what they began. Both change between two steps of the event loop; what takes time runs on
    another thread. A bundle that cannot be used takes nothing down: what was served before stays.
    Without a directory to watch, everything stays as it is.
    """

    def __init__(
        self,
        config: ServeConfig,
        models: dict[str, ServedModel],
        snapshots: SnapshotWriter | None,
        period_s: float = 1.0,
    ) -> None:
        self.models = models
        self.leaving: set[ServedModel] = set()
        self._directory = config.watch
        self._config = config.engine
        self._drain_s = config.drain_seconds
        self._snapshots = snapshots
        self._period_s = period_s
        self._homes: Mapping[str, Path] = {}
        self._unusable: dict[Path, Bundle] = {}  # that no engine could be opened for
        self._doubles: dict[Path, Bundle] = {}  # whose name another one has
        self._is_readable = True
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._drains: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Serve what is there now, then follow the directory on the running event loop.

        Blocks until the former is loaded.
        """
        if self._directory is not None:
            survey = Survey(self._directory)
            self._take(self._look(survey))
            self._task = asyncio.create_task(self._watch(survey))

    async def stop(self) -> None:
        """Follow it no longer. Every engine stays as it is, those that leave as well."""
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
    def running(self) -> list[ServedModel]:
        """Every engine that has not been closed."""
        return [*self.models.values(), *self.leaving]

    async def _watch(self, survey: Survey) -> None:
        while not await self._has_stopped():
            try:
                self._take(await asyncio.to_thread(self._look, survey))
            except Exception:
                _log.exception("looking at %s failed", self._directory)

    async def _has_stopped(self) -> bool:
        """Whether it has before the next look is due."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), self._period_s)
        return self._stopping.is_set()

    # ---- on another thread

    def _look(self, survey: Survey) -> _Change:
        try:
            found = survey.look()
        except OSError as error:
            if self._is_readable:
                _log.error("%s cannot be read, models stay as they are: %s", self._directory, error)
            self._is_readable = False
            return _Change(self._homes)
        self._is_readable = True
        wanted = self._wanted(found)
        homes = {name: bundle.folder for name, bundle in wanted.items()}
        return _Change(homes, self._opened(wanted))

    def _wanted(self, found: Mapping[Path, Bundle]) -> dict[str, Bundle]:
        """Bundles by name; of two with one name it is that which was there first."""
        bundles = sorted(
            found.values(), key=lambda b: (self._homes.get(b.name) != b.folder, b.folder)
        )
        wanted: dict[str, Bundle] = {}
        for bundle in bundles:
            first = wanted.setdefault(bundle.name, bundle)
            if first is not bundle and self._doubles.get(bundle.folder) is not bundle:
                self._doubles[bundle.folder] = bundle
                folder, name = bundle.folder, bundle.name
                _log.error("not taken: %s is named %r, as is %s", folder, name, first.folder)
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
                _log.exception("not taken: %s cannot be loaded", bundle.folder)
                self._unusable[bundle.folder] = bundle
        return opened

    # ---- on the event loop

    def _take(self, change: _Change) -> None:
        self._homes = change.homes
        for name, engine in change.opened.items():
            _log.info("serving %s of %s", _title(engine.bundle), engine.bundle.folder)
            if name in self.models:
                self._dismiss(self.models[name])
            self.models[name] = engine
        for name in self.models.keys() - change.homes.keys():
            self._dismiss(self.models.pop(name))

    def _dismiss(self, engine: ServedModel) -> None:
        _log.info("%s leaves; its streams have %g s to end", _title(engine.bundle), self._drain_s)
        self.leaving.add(engine)
        drain = asyncio.create_task(self._drain(engine))
        self._drains.add(drain)
        drain.add_done_callback(self._drains.discard)

    async def _drain(self, engine: ServedModel) -> None:
        """Close an engine once it holds no session, or has had its time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s):
                while engine.holds_sessions:
                    await asyncio.sleep(_POLL_S)
        await hand_over([engine], self._snapshots)
        await asyncio.to_thread(engine.close)
        self.leaving.discard(engine)
        _log.info("%s is gone", _title(engine.bundle))


def _is_same(one: Bundle, other: Bundle) -> bool:
    return bool(one.fingerprint == other.fingerprint)


def _title(bundle: Bundle) -> str:
    return f"{bundle.name} {bundle.fingerprint[:16]}"
