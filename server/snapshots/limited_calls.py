"""Calls that may hang: whoever makes one waits no longer than it said."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class LimitedCalls:
    """At most `most` calls at once, each on a thread of its own, which is used again when it ends.

    Calls that hang count.
    """

    idle_limit_s = 10.0
    """How long a thread waits for another call before it ends."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._running = self._hung = self._idle = 0
        self._waiting: deque[tuple[_Call[Any], Callable[[], Any] | None]] = deque()
        self._changed = threading.Condition()

    def call(
        self, limit_s: float, function: Callable[[], _T], late: Callable[[], None] | None = None
    ) -> _T:
        """What `function` returns or raises, or TimeoutError after `limit_s` seconds.

        A call that hangs goes on; if it succeeds after all, `late` is called. While `most` calls
        hang, another raises TimeoutError at once.
        """
        began = time.monotonic()
        return self._wait([self._begin(limit_s, function, late)], limit_s, began)[0]

    def call_all(self, limit_s: float, functions: Iterable[Callable[[], _T]]) -> list[_T]:
        """What each of some functions returns, which run at once. See `call`."""
        began = time.monotonic()
        return self._wait([self._begin(limit_s, each) for each in functions], limit_s, began)

    def _begin(
        self, limit_s: float, function: Callable[[], _T], late: Callable[[], None] | None = None
    ) -> _Call[_T]:
        call = _Call(function)
        with self._changed:
            self._changed.wait_for(self._may_begin, limit_s)
            if self._running >= self._most:
                raise TimeoutError(f"{self._hung} calls hang, {self._running} run")
            if len(self._waiting) >= self._idle:
                threading.Thread(target=self._run, name="store", daemon=True).start()
            self._waiting.append((call, late))
            self._running += 1
            self._changed.notify_all()
        return call

    def _wait(self, calls: Sequence[_Call[_T]], limit_s: float, began: float) -> list[_T]:
        with self._changed:
            rest_s = began + limit_s - time.monotonic()
            if not self._changed.wait_for(lambda: all(call.done for call in calls), rest_s):
                for call in calls:
                    call.given_up = not call.done
                    self._hung += call.given_up
                self._changed.notify_all()
                raise TimeoutError(f"no answer within {limit_s:g} s")
        return [call.result() for call in calls]

    def _may_begin(self) -> bool:
        return self._running < self._most or self._hung >= self._most

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                found = self._changed.wait_for(lambda: self._waiting, self.idle_limit_s)
                self._idle -= 1
                if not found:
                    return
                call, late = self._waiting.popleft()
            call.run()
            with self._changed:
                call.done = True
                self._running -= 1
                self._hung -= call.given_up
                self._changed.notify_all()
            if late is not None and call.given_up and call.error is None:
                _Call(late).run()
            del call, late  # what they hold is not kept until the next call


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
