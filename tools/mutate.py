"""Plants known bugs into copies of the source and requires that the tests notice every one.

The bugs are those that an incremental decoder of Combiner-Fixed invites. Each is one replacement
in one file; it has to apply exactly once, or the list below is out of date. Nothing is written to
the working tree. Exit code 1 when a bug goes unseen or does not apply.
"""

from __future__ import annotations

import argparse
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

ROOT = Path(__file__).parents[1]
SOURCES = ("model", "export", "server", "protos", "tests", "pyproject.toml")
TIME_LIMIT_S = 300

_ATTENTION, _GRAPHS = "model/attention.py", "export/graphs.py"
_CACHE, _RUNTIME = "server/cache.py", "server/runtime.py"
_TEST_ATTENTION, _TEST_DECODER = "tests/model/test_attention.py", "tests/model/test_decoder.py"
_TEST_EXPORT = "tests/export/test_parity.py"
_TEST_QUANTISE = "tests/export/test_quantise.py"
_TEST_STREAMS, _TEST_BATCHES = "tests/parity/test_streams.py", "tests/parity/test_batches.py"


@dataclass(frozen=True)
class Mutant:
    """A bug: `old` becomes `new` in `file`, and `test` has to fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


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


MUTANTS = (
    Mutant(
        "pooled query is the last query (parallel)",
        _ATTENTION,
        "qb[:, :, :-1].amax(dim=3)",
        "qb[:, :, :-1, -1]",
        _TEST_ATTENTION,
    ),
    Mutant(
        "pooled query starts at zero (parallel)",
        _ATTENTION,
        "qb[:, :, :-1].amax(dim=3)",
        "qb[:, :, :-1].amax(dim=3).clamp(min=0)",
        _TEST_ATTENTION,
    ),
    Mutant(
        "pooled query not scaled",
        _ATTENTION,
        "keys @ query_max.unsqueeze(-1)",
        "keys @ query_max.unsqueeze(-1) * keys.shape[-1] ** 0.5",
        _TEST_ATTENTION,
    ),
    Mutant(
        "pooled query scaled twice",
        _ATTENTION,
        "keys @ query_max.unsqueeze(-1)",
        "keys @ query_max.unsqueeze(-1) * keys.shape[-1] ** -0.5",
        _TEST_ATTENTION,
    ),
    Mutant(
        "summary key is the mean",
        _ATTENTION,
        "return keys.amax(dim=-2)",
        "return keys.mean(dim=-2)",
        _TEST_ATTENTION,
    ),
    Mutant(
        "summary value is the mean",
        _ATTENTION,
        "(weights.unsqueeze(-2) @ values).squeeze(-2)",
        "values.mean(dim=-2)",
        _TEST_ATTENTION,
    ),
    Mutant(
        "a token sees the summary of its own block",
        _ATTENTION,
        ">= own  #",
        "> own  #",
        _TEST_ATTENTION,
    ),
    Mutant(
        "block 0 left out, as the paper's indices have it",
        _ATTENTION,
        "return torch.arange(blocks - 1, device=device) >= own",
        "return (torch.arange(blocks - 1, device=device) - 1) % blocks >= own",
        _TEST_ATTENTION,
    ),
    Mutant("a token sees the next one", _ATTENTION, ".triu(1)", ".triu(2)", _TEST_ATTENTION),
    Mutant(
        "dead entries attended to",
        _ATTENTION,
        "hidden = entries > newest",
        "hidden = entries > 1 + newest",
        _TEST_ATTENTION,
    ),
    Mutant(
        "softmax in bfloat16",
        _ATTENTION,
        "wide = logits if logits.dtype == torch.float64 else logits.float()",
        "wide = logits",
        _TEST_ATTENTION,
    ),
    Mutant(
        "queries not scaled",
        "model/decoder.py",
        "attend(q * self.scale, k, v)",
        "attend(q, k, v)",
        _TEST_DECODER,
    ),
    Mutant(
        "pooled query is the last query (graph)",
        _GRAPHS,
        "torch.maximum(next(remaining), q.amax(dim=2))",
        "0 * next(remaining) + q[:, :, -1]",
        _TEST_EXPORT,
    ),
    Mutant(
        "query maximum not reset between blocks (graph)",
        _GRAPHS,
        "torch.full_like(query_max, _NEVER)",
        "query_max + 0",
        _TEST_EXPORT,
    ),
    Mutant(
        "query maximum starts at zero (graph)",
        _GRAPHS,
        "_NEVER = float(torch.finfo(torch.float32).min)",
        "_NEVER = 0.0",
        _TEST_EXPORT,
    ),
    Mutant("the kernel scales again", _GRAPHS, '"scale": 1.0', '"scale": 0.0', _TEST_EXPORT),
    Mutant(
        "lengths off by one (graph)",
        _GRAPHS,
        "lengths - 1, longest",
        "lengths, longest",
        _TEST_EXPORT,
    ),
    Mutant(
        "the later of two weights lies in the low half",
        "export/packing.py",
        "codes[..., ::2] + codes[..., 1::2] * np.uint8(16)",
        "codes[..., 1::2] + codes[..., ::2] * np.uint8(16)",
        _TEST_QUANTISE,
    ),
    Mutant(
        "a packed matrix is not rounded in the reference",
        "export/quantise.py",
        "matrix.copy_(torch.from_numpy(unpack(packed[name])))",
        "pass",
        _TEST_QUANTISE,
    ),
    Mutant(
        "the head loses its bias",
        "export/quantise.py",
        '*(["", "", *rest] if rest else [])',
        "",
        _TEST_QUANTISE,
    ),
    Mutant(
        "any loss is accepted",
        "export/bundle.py",
        "if not loss <= limit:",
        "if not loss <= 9:",
        _TEST_QUANTISE,
    ),
    Mutant(
        "the loss is measured with exact activations",
        "export/bundle.py",
        '            round_activations(partial / "step.onnx")\n',
        "",
        _TEST_QUANTISE,
    ),
    Mutant(
        "the parity check lets NaN pass",
        "export/parity.py",
        "float(np.maximum(worst, np.abs(got - expected).max()))",
        "max(worst, float(np.abs(got - expected).max()))",
        _TEST_EXPORT,
    ),
    Mutant(
        "a block folds before its last token attends",
        _CACHE,
        "int(n) // span - 1) for row, n in zip(rows, pushed, strict=True) if not n % span",
        "int(n) // span) for row, n in zip(rows, pushed, strict=True) if not (n + 1) % span",
        _TEST_STREAMS,
    ),
    Mutant(
        "a block folds one token late",
        _CACHE,
        "zip(rows, pushed, strict=True) if not n % span",
        "zip(rows, pushed, strict=True) if n > span and n % span == 1",
        _TEST_STREAMS,
    ),
    Mutant(
        "a fold at the wrong base", _CACHE, "int(n) // span - 1", "int(n) // span", _TEST_STREAMS
    ),
    Mutant(
        "positions begin anew in every chunk",
        _RUNTIME,
        "np.arange(position, position + time)",
        "np.arange(time)",
        _TEST_STREAMS,
    ),
    Mutant(
        "positions begin anew after prefill",
        _CACHE,
        "self._append(self._bench_pushed)",
        "self._append(0)",
        _TEST_STREAMS,
    ),
    Mutant(
        "a step's lengths off by one", _RUNTIME, "lengths + 1, np", "lengths, np", _TEST_STREAMS
    ),
    Mutant(
        "a step reads a dead entry", _RUNTIME, "lengths + 1, np", "lengths + 2, np", _TEST_STREAMS
    ),
    Mutant(
        "a chunk reads a dead entry",
        _RUNTIME,
        "np.array([length + time])",
        "np.array([length + time + 1])",
        _TEST_STREAMS,
    ),
    Mutant(
        "a move leaves the newest entry behind",
        _RUNTIME,
        "buffer[target, :, :length] = buffer[source, :, :length]",
        "buffer[target, :, : length - 1] = buffer[source, :, : length - 1]",
        _TEST_STREAMS,
    ),
    Mutant(
        "a move leaves the query maximum behind",
        _RUNTIME,
        "buffer[target] = buffer[source]",
        "pass",
        _TEST_STREAMS,
    ),
    Mutant(
        "a parked stream loses its newest entry",
        _RUNTIME,
        "[row, :, :length].copy()",
        "[row, :, : length - 1].copy()",
        _TEST_STREAMS,
    ),
    Mutant(
        "query maximum not reset between blocks (server)",
        _RUNTIME,
        "buffer[row] = values[index]",
        "pass",
        _TEST_STREAMS,
    ),
    Mutant(
        "the bench keeps the last stream's query maximum",
        _CACHE,
        "self._runtime.reset(self._bench)",
        "pass",
        _TEST_BATCHES,
    ),
    Mutant(
        "a row keeps the last stream's query maximum",
        _CACHE,
        "self._runtime.reset(row)",
        "pass",
        _TEST_BATCHES,
    ),
    Mutant(
        "the last row not moved when one leaves",
        _CACHE,
        "self._runtime.move(last, row, self._bundle.entries(int(self._pushed[last])))",
        "pass",
        _TEST_BATCHES,
    ),
    Mutant(
        "the last row's books not moved when one leaves",
        _CACHE,
        "self._pushed[row] = self._pushed[last]",
        "pass",
        _TEST_BATCHES,
    ),
    Mutant(
        "a fold writes into its neighbours",
        _RUNTIME,
        "buffer[row, :, base] = values[index, :, 0]",
        "buffer[:, :, base] = values[index, :, 0]",
        _TEST_BATCHES,
    ),
    Mutant(
        "two folds at once share the first summary",
        _RUNTIME,
        "buffer[row, :, base] = values[index, :, 0]",
        "buffer[row, :, base] = values[0, :, 0]",
        _TEST_BATCHES,
    ),
)


def copy_tree(root: Path, target: Path) -> None:
    """Copy what the tests need from `root` to `target`, which is made."""
    target.mkdir()
    for name in SOURCES:
        if (root / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
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
            "bring tools/mutate.py up to date"
        )
    mutated = source.replace(mutant.old, mutant.new)
    compile(mutated, mutant.file, "exec")
    path.write_text(mutated, encoding="utf-8")


def run_tests(tree: Path, tests: Sequence[str], bundles: Path | None = None) -> Outcome:
    """Run `tests` in `tree` until one fails, with the bundles in `bundles`, or newly exported."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        **({} if bundles is None else {"TINY_BUNDLES": str(bundles)}),
        "OMP_NUM_THREADS": "1",  # several of these run side by side
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
    said = failed[0] if failed else f"pytest ended with {done.returncode}: {''.join(lines[-1:])}"
    return Outcome(done.returncode, said, time.monotonic() - began)


def try_sound(root: Path, work: Path, mutants: Sequence[Mutant]) -> Outcome:
    """What the tests of all `mutants` say without any; leaves the bundles they exported."""
    copy_tree(root, work / "sound")
    return run_tests(work / "sound", sorted({m.test for m in mutants}), work / "bundles")


def try_mutant(root: Path, work: Path, mutant: Mutant, sound: Future[Outcome]) -> Outcome:
    """What its test says to `mutant`, planted into a copy of `root`."""
    tree = work / mutant.name.replace(" ", "-")
    copy_tree(root, tree)
    plant(tree, mutant)
    if not mutant.file.startswith("server/"):
        return run_tests(tree, [mutant.test])
    sound.result()  # what the server reads is not what was mutated
    return run_tests(tree, [mutant.test], work / "bundles")


def survey(root: Path, mutants: Sequence[Mutant], jobs: int) -> bool:
    """Plant each of `mutants`, print what noticed it, and say whether none went unseen."""
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
            said = outcome.failure.removeprefix("FAILED ").removeprefix("ERROR ")
            print(f"{verdict}  {mutant.name:<50} {outcome.seconds:4.0f} s  {said}", flush=True)
    print(f"{caught} of {len(mutants)} bugs caught")
    return caught == len(mutants)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="plant only bugs whose name holds this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="test runs side by side")
    options = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if options.only in mutant.name]
    if not mutants:
        parser.error(f"no bug is named like {options.only!r}")
    return 0 if survey(ROOT, mutants, options.jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
