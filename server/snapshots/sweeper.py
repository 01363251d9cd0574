"""Drops what expired in the store, on a thread of its own; one server does it for all."""

from __future__ import annotations

import logging
import threading
import time

from server.request import LONGEST_KEEP_S
from server.snapshots.names import TOMBSTONE
from server.snapshots.store import Store

_log = logging.getLogger(__name__)
PERIOD_S = 600.0


class Sweeper:
    """Sweeps `store` in each period, unless another server does."""

    def __init__(self, store: Store, ttl_s: float, period_s: float = PERIOD_S) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._period_s = period_s
        self._closing = threading.Event()
        self._failing = False
        threading.Thread(target=self._run, name="sweeper", daemon=True).start()

    def close(self) -> None:
        """Sweep no more; nobody waits for a sweep that runs."""
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.wait(self._period_s - time.time() % self._period_s):
            try:
                if self._store.begin_sweep(int(time.time() // self._period_s)):
                    # Until no server can hold it any more, a deleted stream stays deleted.
                    swept = self._store.sweep(self._ttl_s, {TOMBSTONE: LONGEST_KEEP_S})
                    _log.info("%d expired streams were removed from the store", swept)
                self._failing = False
            except Exception as error:
                if not self._failing:  # once for an outage
                    _log.warning("the store cannot be swept (%s)", type(error).__name__)
                self._failing = True
