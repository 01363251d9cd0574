"""Plants known bugs into copies of the source and requires that the tests notice every one.

The bugs are those that an incremental decoder of a Combiner invites. Each is one replacement
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

ROOT = Path(__file__).parents[2]
SOURCES = ("model", "export", "server", "protos", "tests", "pyproject.toml")
TIME_LIMIT_S = 600

_KERNELS = "tests/model/test_attention.py"
_DECODER = "tests/model/test_decoder.py"
_PATTERNS = "tests/model/test_patterns.py"
_LAYERS = "tests/model/test_streams.py"
_EXPORT = "tests/export/test_parity.py"
_QUANTISE = "tests/export/test_quantise.py"
_STREAMS = "tests/parity/test_streams.py"
_BATCHES = "tests/parity/test_batches.py"
_RESTORE = "tests/parity/test_restore.py"


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


def _bugs(file: str, test: str, *bugs: tuple[str, str, str]) -> list[Mutant]:
    """Name, old and new of each that is planted into `file` and noticed by `test`."""
    return [Mutant(name, file, old, new, test) for name, old, new in bugs]


MUTANTS = (
    *_bugs(
        "model/attention.py",
        _KERNELS,
        (
            "dead entries attended to",
            "hidden = entries > _newest",
            "hidden = entries > 1 + _newest",
        ),
    ),
    *_bugs(
        "model/attention.py",
        _PATTERNS,
        (
            "pooled query not scaled",
            "keys @ query.unsqueeze(-1)",
            "keys @ query.unsqueeze(-1) * keys.shape[-1] ** 0.5",
        ),
        (
            "pooled query scaled twice",
            "keys @ query.unsqueeze(-1)",
            "keys @ query.unsqueeze(-1) * keys.shape[-1] ** -0.5",
        ),
        ("summary value is the mean", "softmax((keys @ query", "softmax(0 * (keys @ query"),
        ("a token sees the next one", ".triu(1)", ".triu(2)"),
        (
            "softmax in bfloat16",
            "torch.softmax(widen(logits), dim=-1)",
            "torch.softmax(logits, dim=-1)",
        ),
        ("full attention scales again", "is_causal=True, scale=1.0", "is_causal=True"),
    ),
    *_bugs(
        "model/patterns/fixed.py",
        _PATTERNS,
        ("pooled query is the last query", "else q).amax(dim)", "else q).select(dim, -1)"),
        (
            "pooled query starts at zero",
            "else q).amax(dim)",
            "else q).amax(dim).clamp(min=0)",
        ),
        ("summary key is the mean", "else k).amax(dim=-2)", "else k).mean(dim=-2)"),
        ("a token sees the summary of its own block", "far >= own[:, None]", "far > own[:, None]"),
        (
            "block 0 left out, as the paper's indices have it",
            "far >= own[:, None]",
            "(far >= own[:, None]) | (far == 0)",
        ),
        ("mean of the queries is their sum", "return q.mean(dim)", "return q.sum(dim)"),
        ("mean of the keys is their sum", "return k.mean(dim=-2)", "return k.sum(dim=-2)"),
        ("DeepSets layer of the keys skipped", "F.relu(self.of_keys(k))", "k"),
        ("DeepSets layer of the queries skipped", "F.relu(self.of_queries(q))", "q"),
        (
            "DeepSets layer of the queries for the keys",
            "F.relu(self.of_keys(k))",
            "F.relu(self.of_queries(k))",
        ),
        ("DeepSets without its ReLU", "F.relu(self.of_keys(k))", "self.of_keys(k)"),
        (
            "own block as a summary, too, as TensorFlow has it",
            "unseen = far == own[:, None]",
            "unseen = far < 0 * own[:, None]",
        ),
        (
            "padding attended to",
            ".view(blocks, 1, span) >= q.shape[2]",
            ".view(blocks, 1, span) > q.shape[2]",
        ),
        (
            "sparse parent sees the first token of a block",
            "[:, :, :-1, -1] for y",
            "[:, :, :-1, 0] for y",
        ),
    ),
    *_bugs(
        "model/patterns/fixed.py",
        _LAYERS,
        (
            "pooled query is the last query (stream)",
            'torch.maximum(state["pooled_query"], self._pooled_query(by_token, dim=1))',
            '0 * state["pooled_query"] + self._pooled_query(by_token, dim=1)',
        ),
        ("query maximum not reset between blocks", "torch.full_like(query, initial)", "query + 0"),
        (
            "query maximum starts at zero",
            '"recurrent", (self.heads, self.dim), initial)',
            '"recurrent", (self.heads, self.dim))',
        ),
        (
            "query maximum starts at zero after a fold",
            "torch.full_like(query, initial)",
            "torch.zeros_like(query)",
        ),
        ("mean of the queries is their sum (stream)", "q.sum(dim=2) / self.span", "q.sum(dim=2)"),
        ("mean of the queries is that of a chunk", "q.sum(dim=2) / self.span", "q.mean(dim=2)"),
        (
            "sparse parent keeps the first token of a block",
            "state[name][:, :, -1:]",
            "state[name][:, :, :1]",
        ),
    ),
    *_bugs(
        "model/patterns/grid.py",
        _PATTERNS,
        ("sums instead of maxima, as TensorFlow has it", "cumulative_max(y)", "y.cumsum(dim=-2)"),
        (
            "a summary holds its own reader",
            "future(q.shape[-2] + 1, q.device)[:-1, 1:]",
            "future(q.shape[-2], q.device)",
        ),
    ),
    *_bugs(
        "model/patterns/grid.py",
        _LAYERS,
        (
            "own row above itself",
            "tokens < positions[..., None], positions)",
            "tokens <= positions[..., None], positions)",
        ),
    ),
    *_bugs(
        "model/patterns/vertical.py",
        _PATTERNS,
        (
            "own column as a summary, too",
            "values.transpose(2, 3), own | first",
            "values.transpose(2, 3), first",
        ),
        (
            "row 0 sees itself as summaries",
            "values.transpose(2, 3), own | first",
            "values.transpose(2, 3), own",
        ),
    ),
    *_bugs(
        "model/patterns/vertical.py",
        _LAYERS,
        (
            "live summary instead of the snapshot",
            'state[f"column_{name}"].unsqueeze(1)',
            'state[f"live_{name}"].unsqueeze(1)',
        ),
        ("own column as a summary, too (stream)", "!= positions[..., None] % width", ">= 0"),
        (
            "a column's maximum starts at zero",
            'StateTensor("live_queries", "recurrent", line, NEVER)',
            'StateTensor("live_queries", "recurrent", line)',
        ),
    ),
    *_bugs(
        "model/patterns/horizontal.py",
        _PATTERNS,
        ("sides swapped", "left, right = _sides(q, k, v)", "right, left = _sides(q, k, v)"),
        ("right side not reversed", "y.flip(-2) for y", "y for y"),
        ("right side reversed once", "(keys.flip(-2), values.flip(-2))", "(keys, values)"),
        ("last column has a right side", "later | (columns == self.grid.width - 1)", "later"),
    ),
    *_bugs(
        "model/patterns/horizontal.py",
        _LAYERS,
        ("sides swapped (stream)", "left, right = _sides(*row)", "right, left = _sides(*row)"),
        ("first column has a left side (stream)", "left.valid & (column > 0)", "left.valid"),
    ),
    *_bugs(
        "model/patterns/mixture.py",
        _PATTERNS,
        (
            "mixture as the average",
            'self.averaged = config.attention == "mixture-averaged"',
            "self.averaged = True",
        ),
        (
            "average as the mixture",
            'self.averaged = config.attention == "mixture-averaged"',
            "self.averaged = False",
        ),
    ),
    *_bugs(
        "model/patterns/mixture.py",
        _LAYERS,
        ("average as the sum (stream)", "out = out / 2", "out = out * 1"),
    ),
    *_bugs(
        "model/patterns/axial.py",
        _PATTERNS,
        (
            "a row is summarised with its future masked",
            "softmax(q @ k.transpose(-1, -2))",
            "softmax((q @ k.transpose(-1, -2)).masked_fill(future(q.shape[-2], q.device), -1e9))",
        ),
        (
            "a row's keys are not normalised",
            "self.norm(x + self.out(joined))",
            "(x + self.out(joined))",
        ),
        (
            "a row's keys without the residual",
            "self.norm(x + self.out(joined))",
            "self.norm(self.out(joined))",
        ),
        ("own row as a summary, too", "rows >= rows[:, None, None]", "rows > rows[:, None, None]"),
        (
            "heads joined in another order",
            "values.permute(0, 2, 3, 1, 4)",
            "values.permute(0, 2, 3, 4, 1)",
        ),
    ),
    *_bugs(
        "model/patterns/axial.py",
        _LAYERS,
        (
            "inputs of a row kept under one column",
            'write(state["inputs"], x, positions % grid.width)',
            'write(state["inputs"], x, 0 * positions)',
        ),
    ),
    *_bugs(
        "model/patterns/logsparse.py",
        _PATTERNS,
        (
            "value merged from children",
            "expectation(q, raw_k, raw_v)",
            "expectation(q, *(y.unflatten(2, (-1, 2)) for y in level[1:]))",
        ),
        (
            "highest level missing, as JAX has it",
            "for bit in range(bits):",
            "for bit in range((max(length, 2) - 2).bit_length()):",
        ),
        ("the right one of two spans is read", "y[:, :, ::2, None]", "y[:, :, 1::2, None]"),
        (
            "halves mixed as if they were tokens",
            "expectation(query, k, v)",
            "expectation(query, *(y.unflatten(2, (k.shape[2], -1)) for y in tokens[1:]))",
        ),
    ),
    *_bugs(
        "model/patterns/logsparse.py",
        _LAYERS,
        (
            "value merged from children (stream)",
            "expectation(query, raw_k, raw_v)",
            'expectation(query, state["keys"], state["values"])',
        ),
        (
            "a stack is an entry short",
            "1 + _most_bits(config.context)",
            "_most_bits(config.context)",
        ),
        (
            "a span's query not kept",
            '"queries": query.unsqueeze(2),',
            '"queries": state["queries"][:, :, -1:],',
        ),
        ("lower merges do not scale down", "(left_alone + taken).exp()", "taken.exp()"),
        (
            "merges scale down by the other half",
            "F.logsigmoid(-ahead).cumsum",
            "F.logsigmoid(ahead).cumsum",
        ),
        (
            "every merge knows the whole span",
            "y.unsqueeze(2).masked_fill(newer, NEVER)",
            "y.unsqueeze(2).expand(-1, -1, y.shape[2], -1, -1)",
        ),
    ),
    *_bugs(
        "model/patterns/sparse.py",
        _PATTERNS,
        ("window on the wrong side of the block before", "masked_fill(~later", "masked_fill(later"),
        ("own block among the strides", "rows >= rows[:, None]", "rows > rows[:, None]"),
        (
            "longest step back missing",
            "range((length - 1).bit_length())",
            "range((length - 1).bit_length() - 1)",
        ),
    ),
    *_bugs(
        "model/patterns/sparse.py",
        _LAYERS,
        (
            "oldest stride missing (stream)",
            "torch.arange(1, self.blocks,",
            "torch.arange(1, self.blocks - 1,",
        ),
        (
            "longest step back missing (stream)",
            "self.bits = (config.context - 1).bit_length()",
            "self.bits = (config.context - 2).bit_length()",
        ),
    ),
    *_bugs(
        "model/decoder.py",
        _DECODER,
        ("queries not scaled", "attend(self.pattern, q * self.scale,", "attend(self.pattern, q,"),
        (
            "queries scaled twice",
            "attend(self.pattern, q * self.scale,",
            "attend(self.pattern, q * self.scale**2,",
        ),
        ("a pattern sees the input before its norm", "k, v, normed)", "k, v, x)"),
    ),
    *_bugs(
        "export/graphs.py",
        _EXPORT,
        ("the kernel scales twice as much", '"scale": 1.0', '"scale": 2.0'),
        ("lengths off by one (graph)", "lengths - 1, longest", "lengths, longest"),
    ),
    *_bugs(
        "export/parity.py",
        _EXPORT,
        (
            "the parity check lets NaN pass",
            "float(np.maximum(worst, np.abs(got - expected).max()))",
            "max(worst, float(np.abs(got - expected).max()))",
        ),
    ),
    *_bugs(
        "export/packing.py",
        _QUANTISE,
        (
            "the later of two weights lies in the low half",
            "codes[..., ::2] + codes[..., 1::2] * np.uint8(16)",
            "codes[..., 1::2] + codes[..., ::2] * np.uint8(16)",
        ),
    ),
    *_bugs(
        "export/quantise.py",
        _QUANTISE,
        (
            "a packed matrix is not rounded in the reference",
            "matrix.copy_(torch.from_numpy(unpack(packed[name])))",
            "pass",
        ),
        ("the head loses its bias", '*(["", "", *rest] if rest else [])', ""),
    ),
    *_bugs(
        "export/bundle.py",
        _QUANTISE,
        ("any loss is accepted", "if not loss <= limit:", "if not loss <= 9:"),
        (
            "the loss is measured with exact activations",
            '            round_activations(partial / "step.onnx")\n',
            "",
        ),
    ),
    *_bugs(
        "protos/concertina/bundle/resources.py",
        _STREAMS,
        (
            "a carry takes an entry too few",
            "return rows.bit_length(), rows",
            "return max(1, rows.bit_length() - 1), rows",
        ),
        (
            "a carry takes half of its tokens",
            "return rows.bit_length(), rows",
            "return rows.bit_length(), rows // 2",
        ),
        (
            "a counter folds as blocks do",
            "if manifest.fold.binary:\n        rows",
            "if False:\n        rows",
        ),
    ),
    *_bugs(
        "server/runtime/onnx_session.py",
        _STREAMS,
        (
            "positions begin anew in every chunk",
            "np.arange(position, position + time)",
            "np.arange(time)",
        ),
        ("a step's lengths off by one", "lengths + 1, np", "lengths, np"),
        ("a step reads a dead entry", "lengths + 1, np", "lengths + 2, np"),
        (
            "a chunk reads a dead entry",
            "np.array([length + time])",
            "np.array([length + time + 1])",
        ),
    ),
    *_bugs(
        "server/runtime/host_state.py",
        _STREAMS,
        (
            "a move leaves the query maximum behind",
            "part[...] = self._part(tensor, source, NOTHING, extent)",
            "part[...] = part if part.ndim == 2 else self._part(tensor, source, NOTHING, extent)",
        ),
        (
            "query maximum not reset between blocks (server)",
            "            at = numbers[name]\n",
            "            at = numbers[name]\n"
            "            if self._tensors[name].kind == pb.STATE_KIND_RECURRENT:\n"
            "                continue\n",
        ),
        ("a parked state is no copy", ".copy() for t", " for t"),
        (
            "histories read a row late",
            "buffer[begin.tokens : end.tokens]",
            "buffer[begin.tokens + 1 : end.tokens + 1]",
        ),
        (
            "a row's summaries not written into its history",
            "            at = numbers[name]\n",
            "            at = numbers[name]\n"
            "            if self._tensors[name].kind == pb.STATE_KIND_HISTORY:\n"
            "                continue\n",
        ),
    ),
    *_bugs(
        "server/runtime/host_state.py",
        _BATCHES,
        (
            "a fold writes into its neighbours",
            "stack * length + np.array(first)[:, None]",
            "stack * length + first[0]",
        ),
        *(
            (
                f"two folds at once share the first {what}",
                "values.reshape(*at.shape, -1)",
                "(values[:1].repeat(len(at), axis=0) if self._tensors[name].kind == "
                f"pb.STATE_KIND_{kind} else values).reshape(*at.shape, -1)",
            )
            for what, kind in (("summary", "STACK"), ("history", "HISTORY"))
        ),
        (
            "of many folds only the first are done",
            "range(0, len(rows), together)",
            "range(0, together, together)",
        ),
    ),
    *_bugs(
        "server/engine/kv_cache.py",
        _STREAMS,
        (
            "positions begin anew after prefill",
            "self._append(self.bench_pushed)",
            "self._append(0)",
        ),
        (
            "a block folds before its last token attends",
            "fold_size(tokens)",
            "fold_size(tokens + 1)",
        ),
        ("a block folds one token late", "fold_size(tokens)", "fold_size(tokens - 1)"),
        (
            "a fold at the wrong base",
            "self._bundle.entries(tokens - 1) + 1",
            "self._bundle.entries(tokens - 1) + 2",
        ),
        (
            "a move leaves the newest entry behind",
            "row, self._extent(self.bench_pushed)",
            "row, self._extent(self.bench_pushed - 1)",
        ),
        (
            "a history's newest row forgotten",
            "return Extent(self._bundle.entries(pushed), pushed)",
            "return Extent(self._bundle.entries(pushed), pushed - 1)",
        ),
    ),
    *_bugs(
        "server/engine/kv_cache.py",
        _BATCHES,
        (
            "the bench keeps the last stream's query maximum",
            "self._runtime.reset(self._bench)",
            "pass",
        ),
        ("a row keeps the last stream's query maximum", "self._runtime.reset(row)", "pass"),
        (
            "the last row's books not moved when one leaves",
            "self._pushed[row] = self._pushed[last]",
            "pass",
        ),
        (
            "the last row not moved when one leaves",
            "self._runtime.move(last, row, self._extent(int(self._pushed[last])))",
            "pass",
        ),
    ),
    *_bugs(
        "server/snapshots/snapshots.py",
        _RESTORE,
        (
            "recurrent state lost in a snapshot",
            "state[tensor.name] = values.reshape(shape)",
            "state[tensor.name] = values.reshape(shape) * (tensor.kind != 2)",
        ),
        (
            "a snapshot one token ahead of its state",
            "told.pushed = past.parked.pushed",
            "told.pushed = past.parked.pushed + (past.parked.pushed == 3)",
        ),
    ),
    *_bugs(
        "server/engine/loop.py",
        _RESTORE,
        (
            "penalties forget what was drawn before a snapshot",
            "stream.memory.recall(np.array(stream.history, np.int64))",
            "pass",
        ),
    ),
    Mutant(
        "a reader that comes back gets a token twice",
        "server/sessions/subscriber.py",
        "            if self._known_tokens:\n                self._known_tokens -= 1",
        "            if self._known_tokens > 1:\n                self._known_tokens -= 1",
        "tests/server/sessions/test_subscriber.py",
    ),
    Mutant(
        "a revived stream forgets what was drawn since its snapshot",
        "server/engine/stream.py",
        "        known = past.generated[seen:].tolist()",
        "        known = past.generated[seen + 1 :].tolist()",
        "tests/server/engine/test_stream.py",
    ),
    Mutant(
        "a snapshot opens for anybody",
        "server/snapshots/sealer.py",
        "        if header.owner != owner:",
        "        if not header.owner and owner:",
        "tests/server/snapshots/test_sealer.py",
    ),
    Mutant(
        "a wrong draft leaves its mark on the state",
        "server/engine/kv_cache.py",
        "        if count < of and self._bundle.recurrent:",
        "        if count < of and not self._bundle.recurrent:",
        "tests/server/engine/test_prompt_lookup.py",
    ),
    Mutant(
        "a block folds again after a wrong draft",
        "server/engine/decoding.py",
        "        if int(self._cache.pushed[0]) > first and (ending is None or stream.is_kept):",
        "        if ending is None or stream.is_kept:",
        "tests/server/engine/test_prompt_lookup.py",
    ),
    Mutant(
        "a stream that was handed over is taken back",
        "server/engine/loop.py",
        "            self._check_open(self._handing_over)\n            if opened:",
        "            self._check_open()\n            if opened:",
        "tests/server/sessions/test_registry.py",
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
    if not mutant.file.startswith(("server/", "protos/")):
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
