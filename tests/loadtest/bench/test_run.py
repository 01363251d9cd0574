"""Turns and outcomes, with contestants on a machine made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loadtest.bench.contestants import CONTESTANTS
from loadtest.bench.plan import Cell, Plan, Shape, needed_bytes
from loadtest.bench.process import Clock
from loadtest.bench.report import all_rounds
from loadtest.bench.rounds import ratio
from loadtest.bench.run import CellResult, Progress, Report, run
from loadtest.bench.worker import FAILED, NOT_INSTALLED, OK, OUT_OF_MEMORY, Answer, Job
from tests.loadtest.bench.simulated import Machine, Simulated, drifting

NAMED = {contestant.name: contestant for contestant in CONTESTANTS}
STEP_S = {"fixed": 2e-3, "fixed-int8": 1e-3, "full": 5e-3, "genai": 10e-3, "transformers": 8e-3}
SMALL = Shape(layers=1, width=16, heads=2, mlp=32)


class Stage:
    """A run whose contestants are simulated."""

    def __init__(
        self, *names: str, speed: Callable[[float], float] = drifting, **settings: object
    ) -> None:
        self.machine = Machine(speed)
        self.opened: list[Simulated] = []
        self.answers: dict[str, Callable[[str, int], Answer | None]] = {}
        self.progress: list[Progress] = []
        self.cores_busy = 1.0
        self.reports: list[Report] = []
        chosen = tuple(NAMED[name] for name in names)
        defaults: dict[str, object] = {"rounds": 3, "first_token_rounds": 2, "shape": SMALL}
        cells = settings.pop("cells", (Cell(64, 2),))
        self.plan = Plan(cells, chosen, **{**defaults, **settings})  # type: ignore[arg-type]

    def open(self, job: Job) -> Simulated:
        name = next(
            c.name
            for c in self.plan.contestants
            if (c.adapter, c.mode, c.weights, c.state, c.folds)
            == (job.adapter, job.mode, job.weights, job.state, job.span is not None)
        )
        answer = self.answers.get(name, lambda request, index: None)
        self.opened.append(Simulated(job, self.machine, STEP_S[name], name, answer))
        return self.opened[-1]

    def run(self) -> Report:
        report = run(
            self.plan,
            self.open,
            Path("models"),
            self.progress.append,
            Clock(
                self.machine.sleep,
                lambda: self.machine.now,
                lambda: self.cores_busy * self.machine.now,
            ),
            self.reports.append,
        )
        assert all(each.closed for each in self.opened), "something was left running"
        return report

    def windows(self) -> list[str]:
        return [line.split()[0] for line in self.machine.log if line.endswith(" window")]


def outcomes(result: CellResult) -> dict[str, str]:
    return {entry.name: entry.outcome for entry in result.entries}


def test_contestants_stay_open_and_their_windows_go_there_and_back() -> None:
    stage = Stage("fixed", "full", "genai", rounds=2)
    report = stage.run()
    there = ["fixed", "full", "genai"]
    back = there[::-1]
    assert stage.windows() == [*there, *back, *back, *there]
    opens = [line for line in stage.machine.log if line.endswith(" open")]
    assert opens == ["fixed open", "full open", "genai open"]
    (result,) = report.results
    assert [group.names for group in result.groups] == [("fixed", "full", "genai")]
    entry = result.entries[1]
    assert (entry.outcome, entry.cache_bytes, entry.steps, entry.peak_bytes) == (OK, 5, 16, 9)


def test_ratios_hold_on_a_machine_that_drifts_by_two() -> None:
    report = Stage("fixed", "fixed-int8", "genai", rounds=12, cells=(Cell(64, 2),)).run()
    rounds = all_rounds(report.results[0])
    for over, under in (("genai", "fixed"), ("genai", "fixed-int8"), ("fixed", "fixed-int8")):
        found = ratio(rounds, over, under)
        assert found and found.median == pytest.approx(STEP_S[over] / STEP_S[under], rel=0.03)


@pytest.mark.parametrize("outcome", [FAILED, OUT_OF_MEMORY])
def test_who_fails_in_a_window_leaves_and_the_others_go_on(outcome: str) -> None:
    stage = Stage("fixed", "full", "genai")
    stage.answers["full"] = lambda request, index: (
        Answer(outcome, "it broke") if request == "window" and index == 3 else None
    )
    (result,) = stage.run().results
    assert outcomes(result) == {"fixed": OK, "full": outcome, "genai": OK}
    assert stage.windows().count("full") == 4
    assert stage.windows().count("genai") == 6
    assert [set(each) for each in all_rounds(result)] == [
        {"fixed", "full", "genai"},
        {"fixed", "genai"},
        {"fixed", "genai"},
    ]
    assert next(e for e in result.entries if e.name == "full").detail == "it broke"


@pytest.mark.parametrize("request_", ["prepare", "open"])
def test_who_fails_before_is_not_asked_again_in_its_cell(request_: str) -> None:
    stage = Stage("fixed", "genai", cells=(Cell(64, 2), Cell(128, 2)))
    stage.answers["genai"] = lambda request, index: (
        Answer(FAILED, "no") if request == request_ else None
    )
    report = stage.run()
    assert [outcomes(r)["genai"] for r in report.results] == [FAILED, FAILED]
    assert [outcomes(r)["fixed"] for r in report.results] == [OK, OK]
    assert "genai" not in stage.windows()
    assert [len(each.results) for each in stage.reports] == [1, 2]


def test_who_is_not_installed_is_named_with_the_remedy() -> None:
    stage = Stage("fixed", "genai")
    stage.answers["genai"] = lambda request, index: Answer(NOT_INSTALLED, "onnxruntime_genai")
    entry = stage.run().results[0].entries[1]
    assert entry.outcome == NOT_INSTALLED
    assert entry.detail.startswith("onnxruntime_genai; pip install onnxruntime-genai")


def test_what_fits_nowhere_is_out_of_memory_before_anything_runs() -> None:
    stage = Stage("genai", memory_bytes=1)
    (entry,) = stage.run().results[0].entries
    assert entry.outcome == OUT_OF_MEMORY and "may take 0.0 GB (--memory)" in entry.detail
    assert entry.cache_bytes == SMALL.entry_bytes() * (64 + 512)
    assert stage.opened == []


def test_where_memory_is_short_each_peer_meets_our_float32_and_our_best() -> None:
    names = ("fixed", "fixed-int8", "full", "genai", "transformers")
    cell = Cell(64, 2)
    room = sum(needed_bytes(SMALL, NAMED[n], cell) for n in ("fixed", "fixed-int8", "genai"))
    stage = Stage(*names, memory_bytes=room, rounds=2)
    (result,) = stage.run().results
    assert [group.names for group in result.groups] == [
        ("fixed", "fixed-int8"),
        ("fixed", "fixed-int8", "full"),
        ("fixed", "fixed-int8", "genai"),
        ("fixed", "fixed-int8", "transformers"),
    ]
    assert set(outcomes(result).values()) == {OK}
    for peer in ("full", "genai", "transformers"):
        for ours in ("fixed", "fixed-int8"):
            assert ratio(all_rounds(result), peer, ours)


def test_what_others_compute_meanwhile_is_told_apart() -> None:
    stage = Stage("fixed", "full")
    stage.cores_busy = 3.0
    (result,) = stage.run().results
    assert result.others == pytest.approx(2.0)
    assert {entry.busy_while_waiting for entry in result.entries} == {0.0}


def test_who_computes_while_another_does_is_told_too() -> None:
    stage = Stage("fixed", "full")

    def spin(request: str, index: int) -> None:
        if request == "window":
            stage.opened[-1].used_s += 0.04  # `full` spins in a window of 16 steps of `fixed`

    stage.answers["fixed"] = spin
    fixed, full = stage.run().results[0].entries
    assert fixed.busy_while_waiting == 0
    assert 0.04 / (16 * 2e-3) / 3 < full.busy_while_waiting < 0.04 / (16 * 2e-3) * 2.1


def test_the_first_token_has_rounds_of_its_own() -> None:
    stage = Stage("fixed", "genai", cells=(Cell(64, 1, first_token=True),))
    stage.run()
    assert stage.windows().count("genai") == 4
    assert "fixed open_prompt" in stage.machine.log and "fixed open" not in stage.machine.log


def test_progress_grows() -> None:
    stage = Stage("fixed", "full", cells=(Cell(64, 2), Cell(128, 2)))
    stage.run()
    shares = [each.cell + each.share for each in stage.progress]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] < 2
    assert "round 2 of 3" in [each.what for each in stage.progress]
