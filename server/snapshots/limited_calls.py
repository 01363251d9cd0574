"""Calls that may hang: whoever makes one waits no longer than it said."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

_T = TypeVar("_T")


class LimitedCalls:
    """At most `most` calls at once, each on a thread of its own, hung ones included."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._running = self._hung = 0
        self._changed = threading.Condition()

    def call(
        self, limit_s: float, function: Callable[[], _T], late: Callable[[], None] | None = None
    ) -> _T:
        """What `function` returns or raises, or TimeoutError after `limit_s` seconds.

        A call that hangs goes on; if it succeeds after all, `late` is called. While `most` calls
        hang, another raises TimeoutError at once.
        """
        until = time.monotonic() + limit_s
        call = _Call(function)
        with self._changed:
            self._changed.wait_for(self._may_begin, limit_s)
            if self._running >= self._most:
                raise TimeoutError(f"{self._hung} calls hang, {self._running} run")
            run = partial(self._run, call, late)
            threading.Thread(target=run, name="store", daemon=True).start()
            self._running += 1
            if not self._changed.wait_for(lambda: call.done, until - time.monotonic()):
                call.given_up = True
                self._hung += 1
                self._changed.notify_all()
                raise TimeoutError(f"no answer within {limit_s:g} s")
        return call.result()

    def _may_begin(self) -> bool:
        return self._running < self._most or self._hung >= self._most

    def _run(self, call: _Call[_T], late: Callable[[], None] | None) -> None:
        call.run()
        with self._changed:
            call.done = True
            self._running -= 1
            self._hung -= call.given_up
            self._changed.notify_all()
        if late is not None and call.given_up and call.error is None:
            _Call(late).run()


class _Call(Generic[_T]):
    """One call, and what came of it."""

    def __init__(self, function: Callable[[], _T]) -> None:
        self._function = function
        self._returned: list[_T] = []
        self.error: BaseException | None = None
        self.done = self.given_up = False

    def run(self) -> None:
        try:
            self._returned.append(self._function())
        except BaseException as error:
            self.error = error

    def result(self) -> _T:
        if self.error is not None:
            raise self.error
        return self._returned[0]
