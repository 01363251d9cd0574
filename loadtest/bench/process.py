"""Contestants in processes that stay open, and the machine that they share.

One is asked, the others wait and compute nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import psutil

import loadtest
from concertina.machine import cores as usable_cores
from loadtest.bench.contestants import SOURCE
from loadtest.bench.worker import FAILED, OUT_OF_MEMORY, Answer, Job

# Our folders come last, so that the peers' own packages are found first.
_BOOT = (
    "import runpy, sys; sys.path += {paths!r}; "
    "runpy.run_module('loadtest.bench.worker', run_name='__main__', alter_sys=True)"
)
_CLOSE_S = 2.0
_LIBRARIES = ("concertina", "onnxruntime", "numpy")


class Contender(Protocol):
    """An open contestant."""

    def ask(self, request: str, limit_s: float) -> Answer:
        """The answer to `prepare`, `open`, `open_prompt` or `window`."""
        ...

    def cpu_s(self) -> float:
        """Processor time that it has used."""
        ...

    def close(self) -> None:
        """End it."""
        ...


Open = Callable[[Job], Contender]
"""Raises OSError where the process cannot start."""


def busy_s() -> float:
    """Processor time that all programs of this machine have used, and what a host took from it."""
    times = psutil.cpu_times()
    names = ("user", "nice", "system", "irq", "softirq", "steal")  # guests are in user and nice
    return float(sum(getattr(times, name, 0.0) for name in names))


@dataclass(frozen=True)
class Clock:
    """How time passes, and who uses the processors."""

    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.perf_counter
    busy_s: Callable[[], float] = busy_s


class ContenderProcess:
    """A worker, and the pipe to it. After a request that it did not answer, it is gone."""

    def __init__(self, command: list[str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        try:  # in a session of its own: Ctrl-C reaches the bench alone, which then ends all
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,
            )
        except OSError:
            self._errors.close()
            raise
        self._watched = psutil.Process(self._process.pid)

    def ask(self, request: str, limit_s: float) -> Answer:
        """The answer to a request; an outcome, too, where the process dies or takes too long."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
            line = self._line(limit_s)
        except BrokenPipeError:
            line = b""
        except TimeoutError:
            self.close()
            return Answer(FAILED, f"gave no answer to {request} within {limit_s:.0f} s: ended")
        if line.endswith(b"\n"):
            return Answer.parse(line.decode())
        return self._death()

    def cpu_s(self) -> float:
        """Processor time that it has used."""
        try:
            used = self._watched.cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(used.user + used.system)

    def close(self) -> None:
        """End the process and all that it started."""
        _kill(self._process)  # first: whoever finds its input closed may end, and leave others
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def _line(self, limit_s: float) -> bytes:
        """What comes until the end of a line, or of the process. Raises TimeoutError."""
        assert self._process.stdout is not None
        pipe, line, ends = self._process.stdout.fileno(), b"", time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, ends - time.monotonic())):
                    raise TimeoutError
                part = os.read(pipe, 1 << 16)
                if not part:
                    break
                line += part
        return line

    def _death(self) -> Answer:
        try:
            code = self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            code = 0  # it closed its output, and lives
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace")
        self.close()
        if code == -signal.SIGKILL or "bad_alloc" in text:
            return Answer(OUT_OF_MEMORY, "the process was killed")
        last = (text.strip().splitlines() or [""])[-1]
        return Answer(FAILED, f"ended with exit code {code}: {last[:300]}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """At once: nothing that a contestant holds needs care, and some crash as they end."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


@contextlib.contextmanager
def in_processes(peer_python: Mapping[str, str]) -> Iterator[Open]:
    """Opens contenders: ours with this Python, peers with that of their adapter.

    All that are still open in the end are closed.
    """
    opened: list[ContenderProcess] = []

    def open_contender(job: Job) -> ContenderProcess:
        opened.append(ContenderProcess(command_for(job, peer_python)))
        return opened[-1]

    try:
        yield open_contender
    finally:
        for contender in opened:
            contender.close()


def prepare_source(path: Path, models: Path) -> Path:
    """Make of a pretrained model what the engines take, unless it is there; the folder of it.

    Raises RuntimeError, with the reason, where that is not possible.
    """
    path = path.resolve()
    if not path.exists():
        raise RuntimeError(f"{path} does not exist")
    newest = max((path.stat().st_mtime_ns, *(each.stat().st_mtime_ns for each in path.glob("*"))))
    key = hashlib.sha256(f"{path}\0{newest}".encode()).hexdigest()[:12]
    folder = models / f"{path.stem}-{key}"
    if not (folder / SOURCE).exists():
        command = [sys.executable, "-m", "loadtest.bench.adapters.sources", str(path), str(folder)]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            last = (made.stderr.strip().splitlines() or [f"exit code {made.returncode}"])[-1]
            raise RuntimeError(last.removeprefix("error: "))
    return folder


def command_for(job: Job, peer_python: Mapping[str, str]) -> list[str]:
    """What starts the worker of a job."""
    if job.adapter == "ours":
        return [sys.executable, "-m", "loadtest.bench.worker", str(job)]
    python = peer_python.get(job.adapter) or peer_python.get("") or sys.executable
    paths = [str(Path(path).parent) for path in loadtest.__path__]
    return [python, "-c", _BOOT.format(paths=paths), str(job)]


def describe_machine() -> dict[str, object]:
    """The machine that the figures depend on."""
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _LIBRARIES},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
