"""Ratios, targets, doubts, tables and pictures, from figures made up."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from loadtest.bench import command
from loadtest.bench.command import Waiting
from loadtest.bench.contestants import CONTESTANTS
from loadtest.bench.plan import CHECK, FIRST_TOKEN, Cell, Plan, cache_bytes
from loadtest.bench.plots import AGAINST_CONTEXT, AGAINST_STREAMS, plot
from loadtest.bench.report import (
    TARGETS,
    Ratio,
    Target,
    absent,
    as_json,
    base_of,
    doubts,
    from_json,
    ratios,
)
from loadtest.bench.run import CellResult, Entry, Group, Progress, Report
from loadtest.bench.tables import (
    BEGIN,
    BEGIN_PRETRAINED,
    END,
    END_PRETRAINED,
    join,
    markdown,
    put_between,
    render,
)
from loadtest.bench.worker import FAILED, NOT_INSTALLED, OK

NAMED = {contestant.name: contestant for contestant in CONTESTANTS}
AT_16K = Cell(16_384, 8)


def result(cell: Cell, rounds: int = 3, failed: str = "", **seconds: float) -> CellResult:
    """All contestants of `seconds` in one group, each always as fast."""
    names = {name.replace("_", "-"): value for name, value in seconds.items()}
    names = {name.replace("q8-0", "q8_0"): value for name, value in names.items()}
    entries = [Entry(name, OK, "", held(name, cell), 16) for name in names]
    if failed:
        entries.append(Entry(failed, FAILED, "it broke", held(failed, cell)))
    each = {name: (value, value) for name, value in names.items()}
    return CellResult(cell, tuple(entries), (Group(tuple(names), (each,) * rounds),))


def held(name: str, cell: Cell) -> int:
    return cache_bytes(Plan((), ()).shape, NAMED[name], cell.context)


def report(*results: CellResult) -> Report:
    return Report(Plan(tuple(r.cell for r in results), CONTESTANTS), results)


def found(*results: CellResult) -> dict[str, Ratio]:
    return {each.name: each for each in ratios(report(*results))}


def test_best_stands_against_best_and_float32_beside_float32() -> None:
    seen = found(
        result(AT_16K, fixed=2.0, fixed_int8=1.0, full=50.0, genai_graph=40.0, llama_q8_0=20.0)
    )
    best, alike = seen["decode_16k_8_best"], seen["decode_16k_8_float32"]
    assert (best.over, best.under, best.spread.median) == ("llama-q8_0", "fixed-int8", 20.0)
    assert (alike.over, alike.under, alike.spread.median) == ("genai-graph", "fixed", 20.0)
    assert seen["decode_16k_8_fixed-int8_vs_full"].spread.median == 50.0
    assert seen["decode_16k_8_fixed_vs_llama-q8_0"].spread.median == 10.0


def test_each_cell_has_its_own_best() -> None:
    seen = found(
        result(Cell(256, 1), fixed=2.0, fixed_int8=1.0, genai=3.0, full=4.0),
        result(Cell(256, 8), fixed=1.0, fixed_int8=2.0, genai=4.0, full=3.0),
    )
    one, eight = seen["decode_256_1_best"], seen["decode_256_8_best"]
    assert (one.under, one.over) == ("fixed-int8", "genai")
    assert (eight.under, eight.over) == ("fixed", "full")


def test_only_those_of_one_group_are_compared() -> None:
    whole = result(AT_16K, fixed=2.0, fixed_int8=1.0, full=50.0, genai_graph=40.0)
    rounds = whole.groups[0].rounds[0]
    parts = [("fixed", "fixed-int8"), ("fixed", "full"), ("fixed-int8", "genai-graph")]
    groups = tuple(Group(p, ({name: rounds[name] for name in p},) * 3) for p in parts)
    seen = found(replace(whole, groups=groups))
    assert seen["decode_16k_8_best"].over == "genai-graph"
    assert seen["decode_16k_8_float32"].over == "full"
    assert "decode_16k_8_fixed-int8_vs_full" not in seen


def test_our_parts_and_checks_are_no_rivals() -> None:
    seen = found(result(CHECK, fixed=1.0, fixed_steps=0.1, genai=4.0, genai_graph=3.9))
    assert seen["decode_4k_8_best"].over == "genai"
    assert seen["decode_4k_8_best"].under == "fixed"
    assert seen["check_4k_8_genai-graph"].spread.median == pytest.approx(0.975)


def test_a_best_without_a_rival_says_so() -> None:
    seen = found(result(AT_16K, failed="genai-graph", fixed=1.0, transformers=40.0))
    best = seen["decode_16k_8_best"]
    assert best.without == ("genai-graph",) and best.verdict == "met, without genai-graph"
    assert seen["decode_16k_8_float32"].verdict == "met, without genai-graph"
    seen = found(result(AT_16K, failed="genai-int4-graph", fixed=1.0, transformers=17.0))
    assert seen["decode_16k_8_float32"].without == ()
    assert seen["decode_16k_8_float32"].verdict == "MISSED"


def test_a_best_of_those_that_were_named_says_so() -> None:
    wanted = report(result(AT_16K, fixed=1.0, transformers=40.0))
    named = replace(wanted, plan=replace(wanted.plan, asked_for=True))
    best = next(each for each in ratios(named) if each.name == "decode_16k_8_best")
    assert best.verdict == "met, without those that --only leaves out"


def test_the_step_at_64k_is_compared_with_1k_at_the_same_span() -> None:
    seen = found(result(Cell(65_536, 8), fixed=1.2, fixed_1k=1.0))
    assert seen["step_64k_over_1k_span_256_8"].spread.median == 1.2


def test_states_are_compared_whatever_ran() -> None:
    seen = found(result(Cell(65_536, 8), failed="llama-q8_0", fixed=1.0, full=50.0))
    ours, full, half = (held(name, Cell(65_536, 8)) for name in ("fixed", "full", "llama-q8_0"))
    assert seen["cache_64k_smallest_vs_full_float32"].spread.median == ours / full
    assert seen["cache_64k_smallest_vs_smallest_rival"].spread.median == ours / half


def test_the_first_token_is_compared_with_the_quickest_rival() -> None:
    seen = found(result(FIRST_TOKEN, fixed=2.0, fixed_int8=1.0, genai=8.0, full=7.0))
    assert seen["first_token_16k_best"].spread.median == 7.0
    assert seen["first_token_16k_best"].verdict == "met"
    assert not any(name.startswith("cache") for name in seen)


@pytest.mark.parametrize(
    ("target", "met", "missed", "text"),
    [
        (Target(at_least=15), 15.0, 14.9, ">= 15"),
        (Target(at_most=0.25), 0.25, 0.26, "<= 0.25"),
        (Target(0.95, 1.05), 1.05, 1.06, ">= 0.95, <= 1.05"),
        (Target(0.95, 1.05), 0.95, 0.94, ">= 0.95, <= 1.05"),
    ],
)
def test_targets(target: Target, met: float, missed: float, text: str) -> None:
    assert target.met(met) and not target.met(missed)
    assert str(target) == text


def test_every_target_is_the_name_of_a_ratio() -> None:
    ours = {"fixed": 1.0, "fixed_int8": 1.0, "fixed_1k": 1.0}
    rivals = {"genai": 2.0, "genai_graph": 2.0, "genai_int4": 2.0, "genai_int4_graph": 2.0}
    cells = (*(Cell(256, n) for n in (1, 8, 32)), CHECK, AT_16K, Cell(65_536, 8), FIRST_TOKEN)
    results = [result(cell, **ours, **rivals, llama_q8_0=3.0) for cell in cells]
    drawn = report(*results)
    pretrained = replace(drawn, plan=replace(drawn.plan, source="Smol"))
    seen = {each.name for wanted in (drawn, pretrained) for each in ratios(wanted)}
    assert set(TARGETS) <= seen


def test_a_pretrained_model_has_ratios_and_targets_of_its_own() -> None:
    wanted = report(result(Cell(256, 8), fixed=1.0, fixed_int8=0.5, llama_q8_0=0.45, genai=0.9))
    wanted = replace(wanted, plan=replace(wanted.plan, source="Smol"))
    seen = {each.name: each for each in ratios(wanted)}
    best = seen["pretrained_256_8_best"]
    assert (best.over, best.under, best.verdict) == ("llama-q8_0", "fixed-int8", "MISSED")
    assert best.spread.median == pytest.approx(0.9)
    assert seen["pretrained_256_8_float32"].spread.median == pytest.approx(0.9)
    assert all(name.startswith("pretrained_256_8_") for name in seen)
    assert "Smol, 256 x 8" in shown(wanted)
    assert markdown(wanted, {"cpu": "Abacus"}).startswith("Smol; Abacus, ")


def test_ours_in_float32_is_the_base_whatever_its_name() -> None:
    named = {**NAMED, "ours": replace(NAMED["fixed"], name="ours")}
    assert base_of([NAMED["fixed-int8"], named["ours"], NAMED["genai"]]) == "ours"
    assert base_of([NAMED["genai"], NAMED["fixed-int8"]]) == "fixed-int8"


def test_a_best_without_our_float32_has_no_ratio_in_float32() -> None:
    seen = found(result(Cell(256, 8), fixed_int8=0.5, genai=0.9))
    assert "decode_256_8_best" in seen and "decode_256_8_float32" not in seen


def test_doubts_name_the_cell_and_the_reason() -> None:
    still = result(AT_16K, fixed=1.0, full=2.0)
    assert doubts(report(still)) == []
    moving = replace(still, groups=(Group(("fixed",), ({"fixed": (1.0, 1.2)},) * 3),))
    (doubt,) = doubts(report(moving))
    assert doubt.startswith("16k x 8: the machine moved too much: the two windows of a round")
    (doubt,) = doubts(report(result(AT_16K, rounds=2, fixed=1.0)))
    assert doubt == "16k x 8: 2 rounds are too few for a spread: --rounds 3 or more"
    busy = replace(still, entries=(replace(still.entries[0], busy_while_waiting=0.5),))
    (doubt,) = doubts(report(busy))
    assert "fixed computed 50% of the time of another's window (limit 5%)" in doubt
    (doubt,) = doubts(report(replace(still, others=0.53)))
    assert doubt.startswith("16k x 8: other programs kept 0.53 cores busy (limit 0.1)")
    (doubt,) = doubts(report(result(CHECK, fixed=1.0, genai=4.0, genai_graph=3.0)))
    assert doubt.startswith("genai-graph takes 0.75 times as long as genai")


def test_what_was_not_measured_is_named_once_with_its_cells() -> None:
    entry = Entry("genai", NOT_INSTALLED, "pip install onnxruntime-genai", 1)
    cells = [result(Cell(256, n), fixed=1.0) for n in (1, 8)]
    cells = [replace(r, entries=(*r.entries, entry)) for r in cells]
    assert absent(report(*cells)) == [
        "onnxruntime-genai: not measured: not installed: pip install onnxruntime-genai "
        "(256 x 1, 256 x 8)"
    ]


def shown(wanted: Report) -> str:
    out = io.StringIO()
    Console(file=out, width=220).print(render(wanted))
    return out.getvalue()


def test_the_tables_show_figures_ratios_and_why_something_is_missing() -> None:
    wanted = report(
        result(Cell(65_536, 8), failed="vllm-float32", fixed=0.008, full=0.4, genai_graph=0.3),
        result(FIRST_TOKEN, fixed=2.5, full=10.0),
    )
    text = shown(wanted)
    assert "8 (8 to 8)" in text and "1,000" in text and "37.5 (37.5 to 37.5)" in text
    assert "onnxruntime-genai: its graph alone, cache made up" in text
    assert "decode_64k_8_float32" in text and "MISSED" in text and ">= 45" in text
    assert "vLLM, float32: not measured: failed: it broke (64k x 8)" in text
    assert "2.5 (2.5 to 2.5)" in text


def test_the_json_gives_the_report_back_and_the_document_its_table(tmp_path: Path) -> None:
    wanted = report(result(AT_16K, fixed=0.006, genai_graph=0.1))
    written = json.loads(json.dumps(as_json(wanted, {"cpu": "Abacus"})))
    assert from_json(written) == wanted
    assert written["figures"][0]["step_ms"] == {"low": 6.0, "median": 6.0, "high": 6.0}
    with pytest.raises(ValueError, match="format is 1: this version reads 2"):
        from_json({**written, "format": 1})
    engines = replace(wanted.results[0].entries[1], versions="onnxruntime-genai 0.18.0")
    entries = (wanted.results[0].entries[0], engines)
    wanted = replace(wanted, results=(replace(wanted.results[0], entries=entries),))
    text = markdown(wanted, written["machine"])
    assert "cache made up: onnxruntime-genai 0.18.0" in text
    assert "| Concertina, Combiner-Fixed | 6 (6 to 6) |" in text and "Abacus" in text
    row = "| `decode_16k_8_float32` | genai-graph / fixed | 16.7 (16.7 to 16.7) | >= 18 |"
    assert f"{row} **missed** |" in text
    document = put_between(f"before\n{BEGIN}\nold\n{END}\nafter\n", text)
    assert document == f"before\n{BEGIN}\n\n{text}\n\n{END}\nafter\n"
    marks = (BEGIN_PRETRAINED, END_PRETRAINED)
    both = f"{document}{marks[0]}\nold\n{marks[1]}\n"
    assert put_between(both, "new", *marks) == f"{document}{marks[0]}\n\nnew\n\n{marks[1]}\n"
    with pytest.raises(ValueError, match="has no lines"):
        put_between("nothing", text)


def test_runs_of_different_cells_are_joined_and_the_last_counts() -> None:
    first = report(result(FIRST_TOKEN, fixed=1.0), result(AT_16K, fixed=1.0))
    second = report(result(AT_16K, fixed=3.0), result(Cell(256, 1), fixed=1.0))
    other = replace(second, plan=replace(second.plan, source="Smol"))
    with pytest.raises(typer.BadParameter, match="of different models"):
        join([first, other])
    joined = join([first, second])
    assert joined.plan.cells == (Cell(256, 1), AT_16K, FIRST_TOKEN)
    assert joined.results[1] == second.results[0]


def test_pictures_need_two_points(tmp_path: Path) -> None:
    one = report(result(Cell(256, 1), fixed=1.0))
    assert plot(one, tmp_path / "none") == []
    cells = [Cell(256, 1), Cell(256, 8), Cell(1024, 8)]
    both = report(
        *(result(cell, fixed=0.002, full=0.01) for cell in cells), result(FIRST_TOKEN, fixed=1.0)
    )
    assert plot(both, tmp_path) == [tmp_path / AGAINST_CONTEXT, tmp_path / AGAINST_STREAMS]
    assert b"</svg>" in (tmp_path / AGAINST_CONTEXT).read_bytes()


def test_the_time_left_follows_from_what_is_behind() -> None:
    now = [0.0]
    plan = Plan((Cell(256, 1), Cell(256, 1)), (NAMED["fixed"],))
    clock = Waiting(plan, lambda: now[0])
    now[0] = 600.0
    line = clock.describe(Progress(0, "round 3 of 9", 0.5))
    assert line == "256 x 1 (cell 1 of 2), round 3 of 9, about 30 min left"
    now[0] = 1200.0
    assert clock.describe(Progress(1, "round 1 of 9", 0.9)).endswith("about 63 s left")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--cells", "256"], "--cells: '256' is not a list of contexts and streams"),
        (["--cells", "", "--no-first-token"], "--cells is empty"),
        (["--only", "fixed,nobody"], "--only: there is no nobody"),
        (["--peer-python", "vlm=/bin/sh"], "there is no vlm; there are genai, llama"),
        (["--peer-python", "vllm=/no/python"], "/no/python is no program that can be run"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: list[str], complaint: str) -> None:
    app = typer.Typer()
    app.command()(command.bench)
    ran = CliRunner().invoke(app, options, env={"COLUMNS": "300"})
    assert ran.exit_code == 2 and complaint in ran.output
