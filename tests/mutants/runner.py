"""Plants bugs into copies of the source, and runs the tests that have to notice them.

Each bug is one replacement in one file; it has to apply exactly once, or its entry is out of date.
"""

from __future__ import annotations

import compileall
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.mutant import Mutant

ROOT = Path(__file__).parents[2]
SOURCES = (
    *("model", "export", "server", "loadtest", "protos", "examples", "tests"),
    "pyproject.toml",
)
TIME_LIMIT_S = 1200

Warm = subprocess.Popen[bytes]
Idle = SimpleQueue[Warm]


@dataclass(frozen=True)
class Outcome:
    """How a test run ended: pytest's exit code, None past the time limit, and what failed first."""

    code: int | None
    failure: str
    seconds: float

    @property
    def caught(self) -> bool:
        """Whether tests ran and one failed; a run that could not begin proves nothing."""
        return self.code == 1


def copy_tree(root: Path, target: Path) -> None:
    """Copy what the tests need from `root` to `target`, which is made."""
    target.mkdir()
    for name in SOURCES:
        if (root / name).is_dir():
            ignore = shutil.ignore_patterns("node_modules")
            shutil.copytree(root / name, target / name, ignore=ignore)
        else:
            shutil.copy2(root / name, target / name)


def plant(tree: Path, mutant: Mutant) -> None:
    """Apply `mutant` to the copy in `tree`. Raises ValueError unless it applies exactly once."""
    path = tree / mutant.file
    source = path.read_text(encoding="utf-8")
    if (count := source.count(mutant.old)) != 1:
        raise ValueError(
            f"{mutant.name}: {mutant.file} holds {mutant.old!r} {count} times, not once; "
            "bring its entry in tests/mutants up to date"
        )
    mutated = source.replace(mutant.old, mutant.new)
    if path.suffix == ".py":
        compile(mutated, mutant.file, "exec")
    path.write_text(mutated, encoding="utf-8")
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()  # told apart by second and size alone


@contextmanager
def borrowed(idle: Idle) -> Iterator[Warm]:
    """One of the processes that run tests, for as long as it is needed."""
    process = idle.get()
    try:
        yield process
    finally:
        idle.put(process)


@contextmanager
def warm() -> Iterator[Warm]:
    """A process that runs tests, one run after the other (warm.py)."""
    environment = {
        # Bundles of another run were exported without the bug.
        **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TINY_BUNDLES")},
        "OMP_NUM_THREADS": "1",  # several of these run side by side
        "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime asks when it is imported
        "HYPOTHESIS_PROFILE": "first",  # that there is a failure is enough
        "LIMIT_S": "20",  # whoever waits in vain need not wait long
    }
    with subprocess.Popen(
        [sys.executable, Path(__file__).with_name("warm.py")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,  # select sees every answer that is not read
    ) as process:
        assert process.stdin is not None
        yield process
        process.stdin.close()


def run_tests(
    process: Warm, tree: Path, tests: Sequence[str], bundles: Path | None = None
) -> Outcome:
    """Run `tests` in `tree` until one fails, with the bundles in `bundles`, or newly exported."""
    assert process.stdin is not None
    assert process.stdout is not None
    options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", f"--basetemp={tree / 'tmp'}"]
    environment = {} if bundles is None else {"TINY_BUNDLES": str(bundles)}
    log = tree / "pytest.log"
    began = time.monotonic()
    request = json.dumps([str(tree), environment, [*options, *tests], str(log)])
    process.stdin.write(f"{request}\n".encode())
    fork = int(process.stdout.readline())
    cut = not select.select([process.stdout], [], [], TIME_LIMIT_S)[0]
    if cut:
        os.killpg(fork, signal.SIGKILL)
    code = int(process.stdout.readline())
    seconds = time.monotonic() - began
    if cut:
        return Outcome(None, f"did not end within {TIME_LIMIT_S} s", seconds)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    failure = failed[0] if failed else f"pytest ended with {code}: {''.join(lines[-1:])}"
    return Outcome(code, failure, seconds)


def try_sound(idle: Idle, work: Path, mutants: Sequence[Mutant]) -> Outcome:
    """Run the tests of all `mutants` without any; leaves the bundles that they export."""
    copy_tree(work / "source", work / "sound")
    tests = sorted({mutant.test for mutant in mutants})
    with borrowed(idle) as process:
        return run_tests(process, work / "sound", tests, work / "bundles")


def try_mutant(idle: Idle, work: Path, mutant: Mutant, sound: Future[Outcome]) -> Outcome:
    """Run the test of `mutant`, planted into a copy of the source."""
    tree = work / mutant.name.replace(" ", "-")
    copy_tree(work / "source", tree)
    plant(tree, mutant)
    bundles = None
    if mutant.file.startswith(("server/", "protos/", "loadtest/")):
        sound.result()  # what is read is not what was mutated
        bundles = work / "bundles"
    with borrowed(idle) as process:
        return run_tests(process, tree, [mutant.test], bundles)


def survey(root: Path, mutants: Sequence[Mutant], jobs: int) -> bool:
    """Plant each of `mutants` and print which test notices it; whether all are noticed."""
    caught = 0
    idle: Idle = SimpleQueue()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mutants-")))
        copy_tree(root, work / "source")
        compileall.compile_dir(work / "source", quiet=2)
        for _ in range(jobs):
            idle.put(stack.enter_context(warm()))
        pool = stack.enter_context(ThreadPoolExecutor(jobs))
        sound = pool.submit(try_sound, idle, work, mutants)
        outcomes = pool.map(lambda mutant: try_mutant(idle, work, mutant, sound), mutants)
        if sound.result().code != 0:
            print(f"The tests have to pass without a bug: {sound.result().failure}")
            pool.shutdown(cancel_futures=True)
            return False
        print(f"passes  without a bug {sound.result().seconds:38.0f} s", flush=True)
        for mutant, outcome in zip(mutants, outcomes, strict=True):
            caught += outcome.caught
            verdict = "caught" if outcome.caught else "UNSEEN"
            failure = outcome.failure.removeprefix("FAILED ").removeprefix("ERROR ")
            print(f"{verdict}  {mutant.name:<50} {outcome.seconds:4.0f} s  {failure}", flush=True)
    print(f"{caught} of {len(mutants)} bugs caught")
    return caught == len(mutants)
