"""Threads share one heap, unless whoever starts the server says otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

COUNT = """
import ctypes, threading
from server.ops.heap import share_one_heap
{share}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
here = threading.Barrier(4)
def work():
    libc.malloc(1000)
    here.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc.fdopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
@pytest.mark.parametrize(
    ("share", "asked", "heaps"),
    [("", None, 5), ("share_one_heap()", None, 1), ("share_one_heap()", "3", 3)],
)
def test_threads_share_one_heap(share: str, asked: str | None, heaps: int) -> None:
    environment = {name: os.environ[name] for name in os.environ if name != "MALLOC_ARENA_MAX"}
    if asked is not None:
        environment["MALLOC_ARENA_MAX"] = asked
    command = [sys.executable, "-c", COUNT.format(share=share)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.count("<heap nr=") == heaps
