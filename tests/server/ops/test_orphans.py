from __future__ import annotations

import os
import subprocess
import sys

import psutil

# A child starts a grandchild that ignores SIGTERM, and ends; both are told to `end_children`.
SCRIPT = """
import subprocess, sys
from server.ops.orphans import adopt_orphans, end_children

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
