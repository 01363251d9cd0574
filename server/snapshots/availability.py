"""Whether the store answers; when it does not, it is tried until it does."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from server.ops import metrics

_log = logging.getLogger(__name__)


class Availability:
    """Up until an operation fails, then down until `probe` works.

    probe: raises OSError while the store is away. on_up: called on a thread of its own when the
    store is back.
    """

    shortest_pause_s, longest_pause_s = 1.0, 30.0

    def __init__(self, probe: Callable[[], None], on_up: Callable[[], None]) -> None:
        self._probe = probe
        self._on_up = on_up
        self._changed = threading.Condition()
        self._pause_s = 0.0
        self._told = self._hurried = self._closing = False
        self._thread: threading.Thread | None = None  # while the store is away
        metrics.STORE_UP.set(1)

    @property
    def is_up(self) -> bool:
        """Whether the last that we know is that the store works."""
        return self._thread is None

    def failed(self, error: OSError) -> None:
        """An operation failed: the store is away."""
        with self._changed:
            if self._thread is not None or self._closing:
                return
            thread = threading.Thread(target=self._retry, name="store retry", daemon=True)
            try:
                thread.start()  # it waits for the lock
            except RuntimeError as none:  # the next failure tries again
                _log.error("no thread can be started to try the snapshot store again: %s", none)
                return
            self._thread = thread
            metrics.STORE_UP.set(0)
            if not self._told:
                _log.error(
                    "the snapshot store is away (%s: %s); streams go on, but would not survive",
                    type(error).__name__,
                    error,
                )
            self._told = True

    def worked(self) -> None:
        """Something real was written: an outage, if there was one, is over."""
        with self._changed:
            if self._told and self._thread is None:
                _log.warning("the snapshot store is back")
                self._told = False
            self._pause_s = 0.0

    def hurry(self) -> None:
        """Try now instead of after a pause."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()

    def close(self) -> None:
        """Try no more."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _retry(self) -> None:
        while self._waited():
            try:
                self._probe()
            except OSError:
                continue
            with self._changed:
                self._thread = None
                if not self._closing:
                    metrics.STORE_UP.set(1)
            self._on_up()
            return

    def _waited(self) -> bool:
        """Whether to try again, after a pause that grows from time to time."""
        with self._changed:
            until = time.monotonic() + self._pause_s
            while not (self._closing or self._hurried):
                if (rest := until - time.monotonic()) <= 0:
                    break
                self._changed.wait(rest)
            self._hurried = False
            self._pause_s = min(max(self.shortest_pause_s, 2 * self._pause_s), self.longest_pause_s)
            return not self._closing
