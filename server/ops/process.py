"""The process of a server: its signals, its child processes, its heap."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from typing import Final

import psutil

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

ARENAS: Final = "MALLOC_ARENA_MAX"
"""glibc's variable for how many heaps a process may have."""

_PR_SET_CHILD_SUBREAPER = 36
_M_ARENA_MAX = -8


def interrupt_on_stop_signals() -> None:
    """Raise KeyboardInterrupt for each: also for the SIGINT of a process that a shell put in the
    background, and for the SIGTERM of a container's runtime.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)


def ignore_stop_signals() -> None:
    """Let nothing disturb what is going on."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends. Linux only; elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children(patience_s: float) -> None:
    """Wait until all descendants have ended, and kill those that are left after `patience_s`."""
    deadline = time.monotonic() + patience_s
    while processes := psutil.Process().children(recursive=True):
        _, alive = psutil.wait_procs(processes, timeout=max(1.0, deadline - time.monotonic()))
        for process in alive:
            process.kill()


def share_one_heap() -> None:
    """Have threads that begin from now on share the heap of the first. glibc only; else nothing.

    By default each has one of its own. States of a megabyte come and go on all of them, and what
    they leave in one is of no use to the others, so memory grows for hours (tools/soak.py).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and ARENAS not in os.environ:
        mallopt(_M_ARENA_MAX, 1)
