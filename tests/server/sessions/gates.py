"""Threads, a clock and an event loop that move only when a test lets them, one at a time.

A `Stage` stands in for the modules `threading`, `time` and `secrets` of the code under test. Of all
its threads one runs at any moment, until it waits for something. Where it is up to the test what
comes next, a thread stands at a gate. So a run depends on nothing but what the test does, and the
test can have any two things happen in any order.
"""

from __future__ import annotations

import asyncio
import selectors
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

_LIMIT_S = 60.0  # of real time; nothing here takes long
_MOST_TURNS = 20_000
_LONG_AGO = 9e8  # so that no sweep takes what is written now for old


class Gone(BaseException):
    """Ends a thread of a process that was killed."""


class Process:
    """What is killed together."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False


class Gate:
    """Where a thread stands until it is opened, with what happens then."""

    def __init__(self, process: Process, kind: str, what: str) -> None:
        self.process = process
        self.kind = kind
        self.what = what
        self.outcome: str | None = None

    def __repr__(self) -> str:
        return f"{self.kind} of {self.process.name}: {self.what}"


class Thread:
    """A thread of the code under test. See `threading.Thread`."""

    def __init__(self, stage: Stage, target: Callable[[], None], name: str) -> None:
        self.name = name
        self.process = stage.process
        self.gate: Gate | None = None
        self.is_ready: Callable[[], bool] = lambda: True
        self.until = float("inf")
        self.state = "new"
        self._stage = stage
        self._target = target
        self._go = threading.Semaphore(0)

    def start(self) -> None:
        self.state = "alive"
        self._stage.threads.append(self)
        threading.Thread(target=self._run, name=self.name, daemon=True).start()

    def is_alive(self) -> bool:
        return self.state == "alive"

    def join(self, timeout: float | None = None) -> None:
        self._stage.wait(lambda: not self.is_alive(), timeout)

    @property
    def can_go(self) -> bool:
        """Whether what it waits for is there."""
        if self.gate is not None:
            return self.gate.outcome is not None
        return self.until <= self._stage.now or self.is_ready()

    def go(self) -> None:
        """Run until it waits again, or ends."""
        self._go.release()
        if not self._stage.handed_back.acquire(timeout=_LIMIT_S):
            raise AssertionError(f"thread {self.name!r} waits for something unknown to the stage")

    def hand_back(self) -> None:
        """Called on the thread itself: stand still."""
        self._stage.handed_back.release()
        self._go.acquire()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self.process.dead:
                self._target()
        except Gone:
            pass
        except BaseException as error:
            self._stage.errors.append(error)
        self.state = "ended"
        self._stage.handed_back.release()


class Stage:
    """All that moves: threads, an event loop, and the clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.threads: list[Thread] = []
        self.errors: list[BaseException] = []
        """What threads raised."""
        self.handed_back = threading.Semaphore(0)
        self._running: Thread | None = None
        self._outside = Process("the test")
        self._process: ContextVar[Process] = ContextVar("process", default=self._outside)
        self._random = Random(0)
        self.loop = _Loop(self)
        self.loop.set_default_executor(_Pool(self))

    # ---- for the test

    @property
    def gates(self) -> list[Gate]:
        """Where threads stand now."""
        return [thread.gate for thread in self.threads if thread.gate is not None]

    def open(self, gate: Gate, outcome: str = "done") -> None:
        """Let the thread at a gate go on, and all that follows from it."""
        gate.outcome = outcome
        self.settle()

    def settle(self) -> None:
        """Go on until all threads stand at gates, or wait for others or for the clock."""
        for _ in range(_MOST_TURNS):
            self.loop.run_ready()
            movable = [thread for thread in self.threads if thread.can_go]
            if not movable:
                break
            for thread in movable:
                self._resume(thread)
            self.threads = [thread for thread in self.threads if thread.is_alive()]
        else:
            raise AssertionError(f"these never come to rest: {[t.name for t in movable]}")
        if self.errors:
            raise self.errors[0]

    def pass_time(self, seconds: float) -> None:
        """Move the clock on."""
        self.now += seconds
        self.settle()

    @contextmanager
    def inside(self, process: Process) -> Iterator[None]:
        """The tasks and threads that begin here belong to `process`."""
        token = self._process.set(process)
        try:
            yield
        finally:
            self._process.reset(token)

    def kill(self, process: Process) -> None:
        """End all threads of a process where they stand."""
        process.dead = True
        for _ in range(_MOST_TURNS):
            dying = [each for each in self.threads if each.process is process]
            if not dying:
                return
            for thread in dying:
                self._resume(thread)
            self.threads = [thread for thread in self.threads if thread.is_alive()]
        raise AssertionError(f"these survive everything: {[t.name for t in dying]}")

    def close(self) -> None:
        """End all threads and tasks."""
        for process in {thread.process for thread in self.threads}:
            self.kill(process)
        for _ in range(_MOST_TURNS):
            tasks = asyncio.all_tasks(self.loop)
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            self.loop.run_ready()
            for thread in self.threads:
                self.kill(thread.process)
        self.loop.run_ready()
        self.loop.close()

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """In this context the modules of the server use this stage."""
        clock = SimpleNamespace(
            time=lambda: _LONG_AGO + self.now,
            time_ns=lambda: int((_LONG_AGO + self.now) * 1e9),
            monotonic=lambda: self.now,
            perf_counter=lambda: self.now,
        )
        dice = SimpleNamespace(
            token_hex=lambda size: self._random.randbytes(size).hex(),
            token_bytes=self._random.randbytes,
            randbits=self._random.getrandbits,
        )
        threads = SimpleNamespace(
            Thread=self._thread,
            Lock=lambda: Lock(self),
            Condition=lambda: Condition(self),
            Event=lambda: Event(self),
        )
        # An engine that finds its inbox full stands at a gate before it looks.
        inbox = SimpleNamespace(**{**vars(threads), "Event": lambda: Event(self, "inbox")})
        with pytest.MonkeyPatch.context() as patch:
            for name, module in sys.modules.items():
                if not name.startswith(_REPLACED):
                    continue
                is_engine = name == "server.engine.engine"
                for attribute, stand_in in (
                    ("time", clock),
                    ("secrets", dice),
                    ("threading", inbox if is_engine else threads),
                ):
                    if getattr(module, attribute, None) is sys.modules[attribute]:
                        patch.setattr(module, attribute, stand_in)
            yield

    # ---- for threads of the code under test

    @property
    def process(self) -> Process:
        """The process of who asks."""
        return self._running.process if self._running else self._process.get()

    def gate(self, kind: str, what: str) -> str:
        """Stand still until the test lets this thread go on; how it does."""
        thread = self._current
        gate = thread.gate = Gate(thread.process, kind, what)
        try:
            self._stand(thread)
        finally:
            thread.gate = None
        assert gate.outcome is not None
        return gate.outcome

    def wait(self, is_ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """Stand still until something is there, or some time has passed; whether it is there."""
        if is_ready():
            return True
        thread = self._current
        thread.is_ready = is_ready
        thread.until = float("inf") if timeout is None else self.now + max(0.0, timeout)
        self._stand(thread)
        return is_ready()

    @property
    def _current(self) -> Thread:
        assert self._running is not None, "the event loop would block"
        return self._running

    def _stand(self, thread: Thread) -> None:
        if not thread.process.dead:
            thread.hand_back()
        if thread.process.dead:
            raise Gone

    def _resume(self, thread: Thread) -> None:
        self._running = thread
        try:
            thread.go()
        finally:
            self._running = None

    def _thread(self, target: Callable[[], None], name: str, daemon: bool) -> Thread:
        assert daemon
        return Thread(self, target, name)


_REPLACED = (
    "server.api.",
    "server.engine.",
    "server.ops.engine_metrics",
    "server.ops.metrics",
    "server.sessions.",
    "server.snapshots.",
)


class Lock:
    """See `threading.RLock`, which does all that a lock does here."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._holder: object = None
        self._depth = 0

    def __enter__(self) -> None:
        self.take(1)

    def __exit__(self, *_: object) -> None:
        self._depth -= 1

    def take(self, depth: int) -> None:
        """Hold it so many times."""
        me = threading.current_thread()
        if self._holder is not me:
            self._stage.wait(lambda: self._depth == 0)
            self._holder = me
        self._depth += depth

    def drop(self) -> int:
        """Hold it no more; how many times it was held."""
        depth, self._depth = self._depth, 0
        return depth


class Condition:
    """See `threading.Condition`."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._lock = Lock(stage)
        self._notices = 0

    def __enter__(self) -> None:
        self._lock.take(1)

    def __exit__(self, *_: object) -> None:
        self._lock.__exit__()

    def notify_all(self) -> None:
        self._notices += 1

    def wait(self, timeout: float | None = None) -> bool:
        before, depth = self._notices, self._lock.drop()
        try:
            return self._stage.wait(lambda: self._notices > before, timeout)
        finally:
            if not self._stage.process.dead:
                self._lock.take(depth)

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        until = float("inf") if timeout is None else self._stage.now + timeout
        while not (found := predicate()):
            if until <= self._stage.now:
                break
            self.wait(None if timeout is None else until - self._stage.now)
        return found


class Event:
    """See `threading.Event`. Who has waited for it may have to stand at a gate then."""

    def __init__(self, stage: Stage, gate: str = "") -> None:
        self._stage = stage
        self._gate = gate
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        self._stage.wait(self.is_set, timeout)
        if self._gate:
            self._stage.gate(self._gate, "looks")
        return self._is_set


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that runs as long as there is something to do."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        super().__init__(_Selector(self.stop))

    def time(self) -> float:
        return self._stage.now

    def run_ready(self) -> None:
        """Run what is ready, and what becomes ready by it."""
        self.run_forever()


class _Selector(selectors.SelectSelector):
    """Stops the loop instead of waiting."""

    def __init__(self, stop: Callable[[], None]) -> None:
        super().__init__()
        self._stop = stop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout != 0:
            self._stop()
        return super().select(0)


class _Pool(ThreadPoolExecutor):
    """Runs each call of `asyncio.to_thread` on a thread of the stage."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(1)
        self._stage = stage

    def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function(*args, **named)
            except Gone:
                raise
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        Thread(self._stage, run, "call").start()
        return future
