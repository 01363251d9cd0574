"""Settings of a process: signals, child processes, memory allocation."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from typing import Final

import psutil

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

MALLOC_ARENAS: Final = "MALLOC_ARENA_MAX"
"""Environment variable of glibc: how many heaps (arenas) a process may have."""

_PR_SET_CHILD_SUBREAPER = 36
_M_ARENA_MAX = -8


def interrupt_on_stop_signals() -> None:
    """Raise KeyboardInterrupt on SIGINT and SIGTERM.

    A shell makes background processes ignore SIGINT, and container runtimes stop with SIGTERM.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)


def ignore_stop_signals() -> None:
    """Ignore SIGINT and SIGTERM from now on."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent exits. On Linux only; elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children(patience_s: float) -> None:
    """Wait up to `patience_s` seconds for all descendants to exit, then kill the others."""
    deadline = time.monotonic() + patience_s
    while processes := psutil.Process().children(recursive=True):
        _, alive = psutil.wait_procs(processes, timeout=max(1.0, deadline - time.monotonic()))
        for process in alive:
            process.kill()


def share_one_heap() -> None:
    """Make new threads share the heap of the main thread. With glibc only; elsewhere do nothing.

    By default each thread has its own heap. All threads allocate and free states of about a
    megabyte, and memory freed in one heap is not reused by the others, so memory grows for hours,
    as the soak test shows.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and MALLOC_ARENAS not in os.environ:
        mallopt(_M_ARENA_MAX, 1)
