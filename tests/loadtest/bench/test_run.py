"""Turns, outcomes and their record, with measurements made up; and one small real run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from loadtest.bench.plan import CONTESTANTS, Cell, Contestant, Plan, Shape
from loadtest.bench.report import as_json
from loadtest.bench.run import Measure, Report, in_process, run
from loadtest.bench.worker import ADAPTERS, FAILED, NOT_INSTALLED, OK, OUT_OF_MEMORY, Job, Outcome

NAMED = {contestant.name: contestant for contestant in CONTESTANTS}
SMALL = Shape(layers=1, width=16, heads=2, mlp=32)


def plan(*names: str, rounds: int = 2, memory_bytes: int = 8 << 30) -> Plan:
    return Plan(
        cells=(Cell(64, 2),),
        prompt=64,
        contestants=tuple(NAMED[name] for name in names),
        shape=SMALL,
        rounds=rounds,
        windows=2,
        window_s=0.01,
        memory_bytes=memory_bytes,
    )


def made_up(wanted: Plan, measure: Measure) -> Report:
    return run(wanted, measure, Path("models"), lambda what: None)


def test_every_contestant_has_an_adapter() -> None:
    assert {contestant.adapter for contestant in CONTESTANTS} == set(ADAPTERS)
    assert hasattr(ADAPTERS["ours"](), "open_session")


def test_contestants_take_turns_and_each_cell_is_the_median_of_all_windows() -> None:
    order: list[str] = []

    def measure(contestant: Contestant, job: Job) -> Outcome:
        if job.task == "decode":
            order.append(contestant.name)
        return Outcome(OK, tokens_per_s=(len(order), 10.0), first_token_s=2.0, cache_bytes=5)

    report = made_up(plan("fixed", "full", "genai"), measure)
    assert order == ["fixed", "full", "genai", "genai", "full", "fixed"]
    full = next(r for r in report.results if r.contestant == "full")
    assert full.windows == (2, 10.0, 5, 10.0) and full.tokens_per_s == 7.5
    assert full.outcome == OK and full.cache_bytes == 5 and full.span is None
    assert {f.seconds for f in report.first_tokens} == {2.0}


def test_what_does_not_fit_is_out_of_memory_before_anything_is_allocated() -> None:
    def measure(contestant: Contestant, job: Job) -> Outcome:
        assert job.task == "prepare"
        return Outcome(OK)

    report = made_up(plan("full", memory_bytes=1), measure)
    (result,) = report.results
    assert result.outcome == OUT_OF_MEMORY and "0.0 GB" in result.detail
    assert result.tokens_per_s is None and result.cache_bytes == SMALL.entry_bytes * (64 + 512)


def test_a_contestant_that_failed_is_not_tried_again() -> None:
    tried: list[str] = []

    def measure(contestant: Contestant, job: Job) -> Outcome:
        tried.append(job.task)
        return Outcome(OK if job.task == "prepare" else FAILED, "it broke")

    report = made_up(plan("transformers", rounds=3), measure)
    assert tried == ["prepare", "decode", "prepare", "first_token"]
    assert report.results[0].outcome == FAILED and report.results[0].detail == "it broke"


def test_who_is_not_installed_is_named_with_the_remedy(tmp_path: Path) -> None:
    absent = replace(NAMED["genai"], packages=("no_such_engine",))
    wanted = replace(plan("fixed"), contestants=(absent,), first_token=False)
    (result,) = run(wanted, in_process(sys.executable, 60), tmp_path, lambda what: None).results
    assert result.outcome == NOT_INSTALLED
    assert result.detail.startswith("pip install onnxruntime-genai")


def test_a_python_that_is_not_there_fails_and_says_so(tmp_path: Path) -> None:
    wanted = replace(plan("genai"), first_token=False)
    (result,) = run(wanted, in_process("/no/python", 60), tmp_path, lambda what: None).results
    assert result.outcome == FAILED and "/no/python" in result.detail


def test_a_job_survives_its_journey() -> None:
    jobs: list[Job] = []

    def measure(contestant: Contestant, job: Job) -> Outcome:
        jobs.append(job)
        return Outcome(OK, tokens_per_s=(1.0,), first_token_s=1.0)

    made_up(plan("fixed", rounds=1), measure)
    for job in jobs:
        assert Job.parse(str(job)) == job


@pytest.mark.slow
def test_ours_against_full_attention_for_real(tmp_path: Path) -> None:
    wanted = plan("fixed", "fixed-steps", "full", rounds=1)
    report = run(wanted, in_process(sys.executable, 120), tmp_path, lambda what: None)
    assert [(r.contestant, r.outcome, r.detail) for r in report.results] == [
        ("fixed", OK, ""),
        ("fixed-steps", OK, ""),
        ("full", OK, ""),
    ]
    fixed, _, full = report.results
    assert fixed.span == 8 and len(fixed.windows) == 2 and min(fixed.windows) > 0
    assert fixed.cache_bytes == SMALL.entry_bytes * (72 - 1 + 8) + SMALL.entry_bytes // 2
    assert full.cache_bytes == SMALL.entry_bytes * (64 + 512)
    assert all(f.outcome == OK and f.seconds for f in report.first_tokens)
    written = json.loads(json.dumps(as_json(report, {"cores": 1})))
    assert written["format"] == 1 and written["machine"] == {"cores": 1}
    assert written["plan"]["shape"]["width"] == 16
    compared = {"decode_64_2", "first_token_64"}
    names = {f"{ratio}_vs_{whom}" for ratio in compared for whom in ("full", "best", "best_f32")}
    assert set(written["ratios"]) == {*names, "cache_64_vs_full"}
