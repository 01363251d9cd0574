"""Comparisons: the same budget for all, runs that are kept, and a report of what was found."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from concertina.cli.main import main
from export.comparison.compare import (
    RESULTS,
    Entry,
    Result,
    Variant,
    check_memories,
    compare,
    configure,
    run_folder,
)
from export.comparison.report import table, write_report
from model.config import ModelConfig
from model.data import Dataset, DatasetInfo, save_dataset
from model.decoder import Decoder
from model.patterns import PATTERNS
from model.run import RunError, TrainConfig, read_log

BASE = ModelConfig(16, context=64, width=32, layers=2, heads=4, mlp=64, span=8)
Trained = tuple[Path, list[Result]]

BUDGET = TrainConfig(tokens=4 * 2 * 64, rows=2, warmup=1, evaluate_every=2, evaluate_rows=2)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """A text of 16 different bytes in which most follow from the one before."""
    text = (np.arange(2000) * 7 % 16 + (np.arange(2000) % 5 == 0)) % 16
    info = DatasetInfo("text", 16, "counting", "CC0-1.0")
    return Dataset(info, text.astype(np.uint8), text[:200].astype(np.uint8))


@pytest.fixture(scope="module")
def trained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Folder and results of a small comparison."""
    out = tmp_path_factory.mktemp("compared")
    entries = [Entry.parse("fixed@2"), Entry.parse("axial-rowmajor"), Entry.parse("full")]
    return out, compare(dataset, BASE, BUDGET, entries, out)


@pytest.mark.parametrize("name", sorted(PATTERNS.keys() - {"fixed-bidirectional"}))
def test_every_pattern_gets_as_many_weights(name: str) -> None:
    width = {"width": 64, "mlp": 256}
    base = dataclasses.replace(BASE, **width)  # type: ignore[arg-type]
    counts = [
        sum(p.numel() for p in Decoder(config).parameters())
        for config in (base, configure(base, Variant.parse(name)))
    ]
    assert counts[1] == pytest.approx(counts[0], rel=0.003)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fixd", "attention must be one of full, fixed, .* got 'fixd'"),
        ("fixed:median", "pooling must be one of max, mean, deepset-max; got 'median'"),
        ("full:mean", "pooling is mean, but full has no pooling"),
        ("fixed@0", "fixed@0: the number of seeds after @"),
        ("fixed@many", "after @ must be at least 1"),
        ("fixed-bidirectional", "predicts masked tokens: its bits cannot be compared"),
    ],
)
def test_an_entry_that_cannot_be_compared_is_refused_before_any_training(
    text: str, message: str, dataset: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(dataset, BASE, BUDGET, [Entry.parse("full"), Entry.parse(text)], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["fixed", "nope"], "attention must be one of"),
        (["fixed@0"], "number of seeds"),
        (["fixed", "--heads", "7"], "heads"),
    ],
)
def test_the_command_refuses_it_as_an_argument(
    wrong: list[str],
    message: str,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_dataset(tmp_path / "data", dataset)
    folders = [str(tmp_path / "data"), str(tmp_path / "compared")]
    monkeypatch.setattr(sys, "argv", ["concertina", "compare", *folders, *wrong])
    with pytest.raises(SystemExit) as exit:
        main()
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert exit.value.code == 2 and message in said and "TRACEBACK" not in said
    assert not (tmp_path / "compared").exists()


def test_variants_are_read_as_they_are_written() -> None:
    for text in ("fixed", "fixed:mean", "axial-rowmajor"):
        assert str(Variant.parse(text)) == text
    assert Entry.parse("fixed:mean@3") == Entry(Variant("fixed", "mean"), 3)


def test_results_are_those_of_the_runs(trained: Trained) -> None:
    out, results = trained
    assert [(r.variant, r.seed) for r in results] == [
        ("fixed", 0),
        ("fixed", 1),
        ("axial-rowmajor", 0),
        ("full", 0),
    ]
    for result in results:
        log = read_log(run_folder(out, Variant.parse(result.variant), result.seed))
        assert [p.step for p in log] == [2, 4]
        assert result.curve == tuple((p.seconds, p.heldout) for p in log)
        assert result.bits == result.curve[-1][1]
        assert result.seconds == log[-1].seconds > log[0].seconds > 0
    assert results[0].bits != results[1].bits
    fixed, full = results[0], results[3]
    assert fixed.tokens[0] == 1 and fixed.tokens[-1] == 64
    assert full.state_bytes[-1] == 63 * 2 * 2 * 32 * 4
    assert fixed.state_bytes[-1] == ((7 + 7) * 2 + 1) * 2 * 32 * 4
    assert list(fixed.state_bytes) == sorted(fixed.state_bytes)
    assert json.loads((out / RESULTS).read_text()) == json.loads(
        json.dumps([dataclasses.asdict(r) for r in results])
    )


def test_finished_runs_are_kept(
    trained: Trained, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = trained
    seen: list[str] = []

    def on_step(run: str, progress: Any) -> None:
        seen.append(run)

    entries = [Entry.parse("fixed@2"), Entry.parse("full")]
    again = compare(dataset, BASE, BUDGET, entries, out, on_step)
    assert seen == []
    assert again == [results[0], results[1], results[3]]


def test_runs_of_another_budget_are_not_mistaken_for_these(
    trained: Trained, dataset: Dataset
) -> None:
    out, _ = trained
    longer = dataclasses.replace(BUDGET, tokens=2 * BUDGET.tokens)
    with pytest.raises(ValueError, match="has a run with another configuration"):
        compare(dataset, BASE, longer, [Entry.parse("full")], out)


def test_the_table_has_the_best_first_and_the_spread_of_seeds(
    trained: Trained,
) -> None:
    _, results = trained
    better = dataclasses.replace(results[3], bits=0.5)
    head, _, *lines = table([*results[:3], better], "bits/byte").splitlines()
    assert head.startswith("| pattern | bits/byte | seeds |")
    assert lines[0].startswith("| `full` | 0.500 | 1 |")
    (fixed,) = (line for line in lines if "`fixed`" in line)
    bits = [results[0].bits, results[1].bits]
    assert f"| {statistics.mean(bits):.3f} ± {statistics.stdev(bits):.3f} | 2 |" in fixed


def test_the_report_has_two_pictures_that_name_every_pattern(
    trained: Trained, tmp_path: Path
) -> None:
    _, results = trained
    write_report(tmp_path, results, "bits/byte")
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(first) == ["cost.svg", "quality.svg", "table.md"]
    for name in ("cost.svg", "quality.svg"):
        picture = first[name].decode()
        ElementTree.fromstring(picture)
        for variant in ("fixed", "full", "axial-rowmajor"):
            assert f"<!-- {variant} -->" in picture
    write_report(tmp_path, results, "bits/byte")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_memory_is_looked_at_before_it_starts(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, _ = trained
    monkeypatch.setattr("model.memory.available", lambda: 10_000)
    entries = [Entry.parse("fixed@2"), Entry.parse("logsparse")]
    check_memories(BASE, BUDGET, entries[:1], out)  # its runs are finished
    for folder, pattern in ((out, "logsparse"), (tmp_path, "fixed")):
        with pytest.raises(RunError, match=rf"^{pattern}: training needs about .* --force to try"):
            check_memories(BASE, BUDGET, entries, folder)
    longer = dataclasses.replace(BUDGET, tokens=2 * BUDGET.tokens)
    monkeypatch.setattr("model.memory.available", lambda: 1 << 40)
    check_memories(BASE, longer, entries, tmp_path)


def test_without_a_terminal_the_command_says_how_far_it_is(
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_dataset(tmp_path / "data", dataset)
    out = tmp_path / "compared"
    sizes = "--context 64 --span 8 --width 32 --layers 1 --mlp 64 --rows 2 --evaluations 1"
    arguments = [str(tmp_path / "data"), str(out), "fixed", "full", "--tokens", "512"]

    def run(free: int = 1 << 40) -> tuple[object, str]:
        monkeypatch.setattr("model.memory.available", lambda: free)
        monkeypatch.setattr(sys, "argv", ["concertina", "compare", *arguments, *sizes.split()])
        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code, capsys.readouterr().err

    code, said = run(free=10_000)
    assert code == 1 and "fixed: training needs" in said and not out.exists()
    code, said = run()
    assert code == 0
    for name in ("fixed", "full"):
        assert f"{name}, seed 0: 4 steps from the beginning\n{name}, seed 0: step 1 of 4: " in said
        assert re.search(rf"^{name}, seed 0: step 4 of 4: .* bits/byte held out", said, re.M)
    code, said = run(free=10_000)
    assert code == 0
    assert "fixed, seed 0: all 4 steps are done already\n" in said
