"""Ratios, targets and the table, from figures made up."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from loadtest.bench.plan import CONTESTANTS, Cell, Plan
from loadtest.bench.plots import AGAINST_CONTEXT, AGAINST_STREAMS, plot
from loadtest.bench.report import TARGETS, Target, as_json, ratios, render
from loadtest.bench.run import FirstToken, Report, Result
from loadtest.bench.worker import FAILED, NOT_INSTALLED, OK, OUT_OF_MEMORY


def result(
    contestant: str,
    context: int,
    rate: float | None,
    streams: int = 8,
    held: int = 1,
    outcome: str = OK,
    detail: str = "",
) -> Result:
    return Result(contestant, context, streams, None, outcome, detail, rate, (), held)


def report(*results: Result, firsts: tuple[FirstToken, ...] = ()) -> Report:
    cells = tuple(sorted({Cell(r.context, r.streams) for r in results}))
    return Report(Plan(cells=cells), results, firsts)


def test_ours_over_the_best_peer_and_over_our_full_attention() -> None:
    found = ratios(
        report(
            result("fixed", 16_384, 300.0, held=2),
            result("full", 16_384, 50.0, held=100),
            result("genai", 16_384, 10.0),
            result("transformers", 16_384, 20.0),
        )
    )
    assert found == {
        "decode_16k_8_vs_full": 6.0,
        "decode_16k_8_vs_genai": 30.0,
        "decode_16k_8_vs_transformers": 15.0,
        "decode_16k_8_vs_best": 6.0,
        "decode_16k_8_vs_best_f32": 6.0,
        "cache_16k_vs_full": 0.02,
    }


def test_our_other_settings_are_no_peers() -> None:
    found = ratios(report(result("fixed", 1024, 3.0), result("fixed-steps", 1024, 9.0)))
    assert found == {}


def test_a_peer_that_did_not_run_is_not_compared() -> None:
    found = ratios(
        report(
            result("fixed", 1024, 3.0),
            result("genai", 1024, None, outcome=OUT_OF_MEMORY),
            result("transformers", 1024, 1.0),
        )
    )
    assert found == {
        "decode_1k_8_vs_transformers": 3.0,
        "decode_1k_8_vs_best": 3.0,
        "decode_1k_8_vs_best_f32": 3.0,
    }


def test_weights_of_another_type_are_told_apart() -> None:
    found = ratios(
        report(
            result("fixed", 256, 12.0),
            result("llama-q8_0", 256, 24.0),
            result("llama-f32", 256, 4.0),
            result("genai", 256, 6.0),
        )
    )
    assert (found["decode_256_8_vs_best"], found["decode_256_8_vs_best_f32"]) == (0.5, 2.0)


def test_nobody_is_called_the_best_where_a_peer_failed() -> None:
    firsts = (
        FirstToken("fixed", 16_384, OK, "", 1.0, (1.0,)),
        FirstToken("genai", 16_384, FAILED, "it broke", None, ()),
        FirstToken("transformers", 16_384, OK, "", 2.0, (2.0,)),
    )
    found = ratios(
        report(
            result("fixed", 1024, 3.0),
            result("genai", 1024, None, outcome=FAILED),
            result("transformers", 1024, 1.0),
            firsts=firsts,
        )
    )
    assert found == {"decode_1k_8_vs_transformers": 3.0, "first_token_16k_vs_transformers": 0.5}


def test_the_step_at_64k_is_compared_with_1k_at_the_same_span() -> None:
    found = ratios(
        report(
            result("fixed", 1024, 999.0),
            result("fixed-256", 1024, 120.0),
            result("fixed", 65_536, 100.0),
        )
    )
    assert found == {"step_64k_over_1k_span_256_8": 1.2}


def test_the_first_token_is_compared_with_the_quickest_peer() -> None:
    firsts = tuple(
        FirstToken(name, 16_384, OK, "", seconds, (seconds,))
        for name, seconds in (("fixed", 2.0), ("genai", 10.0), ("transformers", 8.0))
    )
    found = ratios(report(result("fixed", 256, 1.0), firsts=firsts))
    assert found["first_token_16k_vs_best"] == 0.25
    assert found["first_token_16k_vs_genai"] == 0.2


@pytest.mark.parametrize(
    ("target", "met", "missed"),
    [(Target(at_least=15), 15.0, 14.9), (Target(at_most=0.25), 0.25, 0.26)],
)
def test_targets(target: Target, met: float, missed: float) -> None:
    assert target.met(met) and not target.met(missed)


def test_the_table_says_why_a_cell_is_empty() -> None:
    wanted = report(
        result("fixed", 65_536, 1234.5, held=16_800_000),
        result("full", 65_536, None, outcome=OUT_OF_MEMORY, detail="needs about 20.0 GB"),
        result("llama-f32", 65_536, None, outcome=NOT_INSTALLED, detail="pip install llama"),
        result("genai", 65_536, 100.0),
        firsts=(FirstToken("full", 16_384, OUT_OF_MEMORY, "", None, ()),),
    )
    out = io.StringIO()
    Console(file=out, width=200).print(render(wanted))
    text = out.getvalue()
    assert "1,234 (16.8)" in text
    assert "out of memory" in text and "not installed" in text
    assert "llama.cpp, f32: not installed: pip install llama" in text
    assert "decode_64k_8_vs_best" in text and "MISSED" in text and ">= 50" in text


def test_the_json_holds_every_cell_and_which_targets_were_met() -> None:
    written = as_json(
        report(result("fixed", 16_384, 300.0), result("genai", 16_384, 10.0)), {"cores": 2}
    )
    assert set(written) == {
        "format",
        "machine",
        "plan",
        "cells",
        "first_tokens",
        "ratios",
        "targets",
    }
    assert written["targets"] == {"decode_16k_8_vs_best": {"target": ">= 15", "met": True}}
    assert set(TARGETS) >= {"decode_64k_8_vs_best", "first_token_16k_vs_best"}


def test_pictures_need_two_points(tmp_path: Path) -> None:
    one = report(result("fixed", 256, 1.0))
    assert plot(one, tmp_path / "none") == []
    both = report(
        *(result(c.name, n, 5.0, s) for c in CONTESTANTS for n in (256, 1024) for s in (1, 8))
    )
    assert plot(both, tmp_path) == [tmp_path / AGAINST_CONTEXT, tmp_path / AGAINST_STREAMS]
    assert b"</svg>" in (tmp_path / AGAINST_CONTEXT).read_bytes()
