"""Plants bugs into copies of the source, and runs the tests that have to notice them.

Each bug is one replacement in one file; it has to apply exactly once, or its entry is out of date.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.mutant import Mutant

ROOT = Path(__file__).parents[2]
SOURCES = (
    *("model", "export", "server", "loadtest", "protos", "examples", "tests"),
    "pyproject.toml",
)
TIME_LIMIT_S = 600


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
            ignore = shutil.ignore_patterns("__pycache__", "node_modules")
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


def run_tests(tree: Path, tests: Sequence[str], bundles: Path | None = None) -> Outcome:
    """Run `tests` in `tree` until one fails, with the bundles in `bundles`, or newly exported."""
    environment = {
        # Bundles of another run were exported without the bug.
        **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TINY_BUNDLES")},
        **({} if bundles is None else {"TINY_BUNDLES": str(bundles)}),
        "OMP_NUM_THREADS": "1",  # several of these run side by side
        "HYPOTHESIS_PROFILE": "first",  # that there is a failure is enough
        "LIMIT_S": "20",  # whoever waits in vain need not wait long
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no"]
    began = time.monotonic()
    try:
        done = subprocess.run(
            [*command, f"--basetemp={tree / 'tmp'}", *tests],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return Outcome(None, f"did not end within {TIME_LIMIT_S} s", time.monotonic() - began)
    lines = (done.stdout + done.stderr).splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    failure = failed[0] if failed else f"pytest ended with {done.returncode}: {''.join(lines[-1:])}"
    return Outcome(done.returncode, failure, time.monotonic() - began)


def try_sound(root: Path, work: Path, mutants: Sequence[Mutant]) -> Outcome:
    """Run the tests of all `mutants` without any; leaves the bundles that they export."""
    copy_tree(root, work / "sound")
    return run_tests(work / "sound", sorted({m.test for m in mutants}), work / "bundles")


def try_mutant(root: Path, work: Path, mutant: Mutant, sound: Future[Outcome]) -> Outcome:
    """Run the test of `mutant`, planted into a copy of `root`."""
    tree = work / mutant.name.replace(" ", "-")
    copy_tree(root, tree)
    plant(tree, mutant)
    if not mutant.file.startswith(("server/", "protos/", "loadtest/")):
        return run_tests(tree, [mutant.test])
    sound.result()  # what is read is not what was mutated
    return run_tests(tree, [mutant.test], work / "bundles")


def survey(root: Path, mutants: Sequence[Mutant], jobs: int) -> bool:
    """Plant each of `mutants` and print which test notices it; whether all are noticed."""
    caught = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(jobs) as pool:
        work = Path(folder)
        sound = pool.submit(try_sound, root, work, mutants)
        outcomes = pool.map(lambda mutant: try_mutant(root, work, mutant, sound), mutants)
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
