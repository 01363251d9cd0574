"""One heap for all threads of a process."""

from __future__ import annotations

import ctypes
import os
from typing import Final

ARENAS: Final = "MALLOC_ARENA_MAX"
"""glibc's variable for how many heaps a process may have."""

_M_ARENA_MAX = -8


def share_one_heap() -> None:
    """Have threads that begin from now on share the heap of the first. glibc only; else nothing.

    By default each has one of its own. States of a megabyte come and go on all of them, and what
    they leave in one is of no use to the others, so memory grows for hours (`make soak`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and ARENAS not in os.environ:
        mallopt(_M_ARENA_MAX, 1)
