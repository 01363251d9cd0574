"""A process that has imported the large libraries already, and forks for each run of pytest.

Most of a short run of tests would be spent with importing these. Started by its path, it knows
nothing of the project: each fork imports the copy of it that its tests are about.

A line of input is JSON: the folder, what to add to the environment, pytest's arguments and a file
for the output. Two lines of output answer: the fork's process id, and how it ended.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback

# Not those that pytest would rewrite when they are imported (its plugins'): it warns of these.
LIBRARIES = (
    *("matplotlib.pyplot", "numpy", "onnx", "onnxruntime", "onnxscript", "PIL.Image", "pytest"),
    *("torch.onnx", "typer"),
)


def run(folder: str, environment: dict[str, str], arguments: list[str], output: str) -> int:
    """Run pytest in `folder`, with its output in a file; its exit code."""
    os.chdir(folder)
    os.environ.update(environment)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path[0] = folder
    pytest = importlib.import_module("pytest")
    return int(pytest.main(arguments))


def serve() -> None:
    """Answer each line of input until there are no more."""
    for name in LIBRARIES:
        importlib.import_module(name)
    for line in sys.stdin:
        pid = os.fork()
        os.setpgid(pid, pid)  # by both, since either may come first
        if pid == 0:
            code = 70  # neither passed nor caught: whatever is raised before pytest runs
            try:
                code = run(*json.loads(line))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        finally:
            os.killpg(pid, signal.SIGKILL)  # also what tests of a bug left running
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
