"""Every process that descends from this one, whoever its parent was, ends with it."""

from __future__ import annotations

import ctypes
import sys
import time

import psutil

_PR_SET_CHILD_SUBREAPER = 36


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
