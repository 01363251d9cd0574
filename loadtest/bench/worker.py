"""One measurement, in a process of its own: a job as JSON in, its outcome as JSON out.

The process may be another Python than ours, where only the peers are installed: nothing is imported
here but Python's own modules, the plan and the adapter.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from loadtest.bench.adapters.adapter import Adapter, Session, Setting
from loadtest.bench.plan import Shape

OK, OUT_OF_MEMORY, NOT_INSTALLED, FAILED = "ok", "out of memory", "not installed", "failed"
_WARM_STEPS = 4
_MOST_STEPS = 64  # the context of a window should stay what the cell says
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """What one process does: `prepare` a model, `decode` in a cell, or time a `first_token`."""

    task: str
    adapter: str
    variant: str
    packages: tuple[str, ...]
    folder: str
    shape: Shape
    context: int
    streams: int
    span: int | None
    room: int
    threads: int
    windows: int
    window_s: float
    memory_bytes: int

    @staticmethod
    def parse(text: str) -> Job:
        """From the JSON of `text`."""
        fields = json.loads(text)
        fields["shape"] = Shape(**fields["shape"])
        fields["packages"] = tuple(fields["packages"])
        return Job(**fields)

    def __str__(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Outcome:
    """The result of a measurement. Everything but `outcome` is empty when that is not `ok`."""

    outcome: str
    detail: str = ""
    tokens_per_s: tuple[float, ...] = ()
    """Over all streams, for each window."""
    first_token_s: float | None = None
    cache_bytes: int | None = None
    """Held for the state of one stream."""

    @staticmethod
    def parse(text: str) -> Outcome:
        """From the JSON of `text`."""
        fields = json.loads(text)
        fields["tokens_per_s"] = tuple(fields["tokens_per_s"])
        return Outcome(**fields)


def perform(job: Job) -> Outcome:
    """Measure. Running out of memory is an outcome, and so is an engine that is not installed."""
    missing = [name for name in job.packages if find_spec(name) is None]
    if missing:
        return Outcome(NOT_INSTALLED, ", ".join(missing))
    setting = Setting(
        job.shape,
        job.variant,
        Path(job.folder),
        job.context,
        job.streams,
        job.span,
        job.threads,
        job.room,
    )
    try:
        if job.task == "prepare" and setting.folder.exists():
            return Outcome(OK)
        adapter = ADAPTERS[job.adapter]()
        if job.task == "prepare":
            _prepare(adapter, setting)
            return Outcome(OK)
        _limit(job)
        if job.task == "first_token":
            return Outcome(OK, first_token_s=adapter.first_token_s(setting))
        session = adapter.open_session(setting)
        try:
            rates = _decode(session, job)
            return Outcome(OK, tokens_per_s=rates, cache_bytes=session.cache_bytes)
        finally:
            session.close()
    except Exception as error:
        return Outcome(OUT_OF_MEMORY if _is_memory(error) else FAILED, _explain(error))


def _ours() -> Adapter:
    from loadtest.bench.adapters import ours

    return ours


def _genai() -> Adapter:
    from loadtest.bench.adapters import genai

    return genai


def _hugging_face() -> Adapter:
    from loadtest.bench.adapters import hugging_face

    return hugging_face


def _llama() -> Adapter:
    from loadtest.bench.adapters import llama

    return llama


# Each is imported by its own jobs alone: the others need packages that may be missing.
ADAPTERS: dict[str, Callable[[], Adapter]] = {
    "ours": _ours,
    "genai": _genai,
    "hugging_face": _hugging_face,
    "llama": _llama,
}


def _prepare(adapter: Adapter, setting: Setting) -> None:
    partial = setting.folder.with_name(f".{setting.folder.name}.{os.getpid()}")
    try:
        adapter.prepare(replace(setting, folder=partial))
        partial.rename(setting.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _limit(job: Job) -> None:
    """The same cores for every engine, and so much memory that the machine stays usable."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    resource.setrlimit(resource.RLIMIT_DATA, (job.memory_bytes, resource.RLIM_INFINITY))


def _decode(session: Session, job: Job) -> tuple[float, ...]:
    cycle = job.span or 1
    warm = session.decode(_WARM_STEPS)
    step_s = warm.seconds * job.streams / warm.tokens
    wanted = min(job.window_s / step_s, _MOST_STEPS)
    steps = max(_WARM_STEPS, math.ceil(wanted / cycle) * cycle)
    session.decode(steps if job.span else _WARM_STEPS)
    windows = [session.decode(steps) for _ in range(job.windows)]
    return tuple(window.tokens / window.seconds for window in windows)


def _is_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "alloc" in text or "out of memory" in text


def _explain(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def main() -> None:
    """Read the job from the first argument, write the outcome as the last line of stdout."""
    job = Job.parse(sys.argv[1])
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(job.threads)))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with contextlib.redirect_stdout(sys.stderr):  # libraries print
        outcome = perform(job)
    print(json.dumps(asdict(outcome)), flush=True)
    os._exit(0)  # some engines crash while the interpreter takes them down


if __name__ == "__main__":
    main()
