from __future__ import annotations

import os
import platform
import subprocess
import sys

import psutil
import pytest

# A child starts a grandchild that ignores SIGTERM, and exits; `end_children` has to end both.
SCRIPT = """
import subprocess, sys
from server.ops.process import adopt_orphans, end_children

adopt_orphans()
stubborn = "import signal, time; signal.signal(15, 1); print('ready', flush=True); time.sleep(99)"
child = '''
import subprocess, sys
grandchild = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
grandchild.stdout.readline()
print(grandchild.pid)
'''
print(subprocess.check_output([sys.executable, "-c", child, stubborn], text=True), flush=True)
end_children(0.5)
"""


def test_orphans_are_adopted_and_ended() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
        text=True,
    )
    assert not psutil.pid_exists(int(done.stdout))


COUNT = """
import ctypes, threading
from server.ops.process import share_one_heap
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
    ("share", "limit", "heaps"),
    [("", None, 5), ("share_one_heap()", None, 1), ("share_one_heap()", "3", 3)],
)
def test_threads_share_one_heap(share: str, limit: str | None, heaps: int) -> None:
    environment = {name: os.environ[name] for name in os.environ if name != "MALLOC_ARENA_MAX"}
    if limit is not None:
        environment["MALLOC_ARENA_MAX"] = limit
    command = [sys.executable, "-c", COUNT.format(share=share)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("<heap nr=") == heaps
