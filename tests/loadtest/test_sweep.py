from __future__ import annotations

from dataclasses import replace

import pytest

from concertina.client import InvalidRequest
from concertina.client.channel import Access
from concertina.v1 import generation_service_pb2 as pb
from loadtest.measure import Plan
from loadtest.reports.objectives import parse_objectives
from loadtest.reports.report import Report, summarise
from loadtest.run import Run, Window
from loadtest.sweep import Axis, Point, Series, at, knee, parse_sweep, run_series, saturation
from loadtest.workload import Lengths
from tests.loadtest.scripted import Context, Serve, Stream, keep_contract

NOTHING = summarise(Run((), (), False, Window(0)), max_lag_s=1.0)


def report(**changes: object) -> Report:
    return replace(NOTHING, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "axis", "values"),
    [
        ("context=1k..4k", Axis.CONTEXT, (1024, 2048, 4096)),
        ("concurrency=1..10", Axis.CONCURRENCY, (1, 2, 4, 8)),
        ("rate=0.5,2,7", Axis.RATE, (0.5, 2, 7)),
        ("context=300,1.5k", Axis.CONTEXT, (300, 1536)),
    ],
)
def test_a_sweep_doubles_or_names_its_values(
    text: str, axis: Axis, values: tuple[float, ...]
) -> None:
    assert (parse_sweep(text).axis, parse_sweep(text).values) == (axis, values)


@pytest.mark.parametrize(
    "text",
    [
        *("", "context", "context=", "speed=1..2", "rate=2..1", "rate=0..8", "rate=2,1"),
        *("rate=1,1", "concurrency=0.5", "concurrency=1.5,3", "rate=1..", "context=1m"),
        f"rate={','.join(str(n) for n in range(1, 66))}",
    ],
)
def test_other_sweeps_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is no sweep; give context, concurrency or rate"):
        parse_sweep(text)


def plan(address: str = "", **changes: object) -> Plan:
    given: dict[str, object] = {
        "address": address,
        "model": "",
        "streams": 2,
        "rate": None,
        "channels": 1,
        "requests": 4,
        "duration_s": None,
        "prompt_tokens": Lengths(1, 4),
        "output_tokens": Lengths(2, 5),
        "prompts": (),
        "warmup": 2,
        "seed": 7,
        "timeout_s": 30.0,
    }
    return Plan(**{**given, **changes})  # type: ignore[arg-type]


def test_a_point_changes_one_thing_of_the_plan() -> None:
    assert at(plan(), Axis.RATE, 8).rate == 8
    wider = at(plan(), Axis.CONCURRENCY, 8)
    assert (wider.streams, wider.warmup) == (8, 8)  # which was as many as streams
    assert at(plan(warmup=1), Axis.CONCURRENCY, 8).warmup == 1
    assert at(plan(), Axis.CONTEXT, 64).prompt_tokens == Lengths(59, 59)  # and 5 that come
    with pytest.raises(ValueError, match="no room for --output-tokens 2-5"):
        at(plan(), Axis.CONTEXT, 4)


def test_a_rate_saturates_when_the_server_falls_behind_refuses_or_misses_objectives() -> None:
    good = report(requests=100, keeps_up=0.95)
    assert saturation(Axis.RATE, None, 8, good) == ""
    assert "at 70% of the rate" in saturation(Axis.RATE, None, 8, replace(good, keeps_up=0.7))
    assert "5 of 100 requests were refused" in saturation(
        Axis.RATE, None, 8, replace(good, refused=5)
    )
    late = replace(good, objectives=parse_objectives("ttft=1"), met_share=0.5)
    assert saturation(Axis.RATE, None, 8, late) == "50% of the requests met the objectives"
    assert saturation(Axis.CONTEXT, None, 8, late) == ""  # a context never ends a sweep


@pytest.mark.parametrize(("tokens_per_s", "is_saturated"), [(180.0, False), (105.0, True)])
def test_streams_saturate_when_more_of_them_bring_no_more_tokens(
    tokens_per_s: float, is_saturated: bool
) -> None:
    before = Point(4, report(tokens_per_s=100.0))
    found = saturation(Axis.CONCURRENCY, before, 8, report(tokens_per_s=tokens_per_s))
    assert bool(found) is is_saturated
    assert saturation(Axis.CONCURRENCY, None, 8, report(tokens_per_s=1.0)) == ""


def test_the_knee_is_the_last_point_before_the_server_saturates() -> None:
    points = [Point(4, NOTHING), Point(8, NOTHING), Point(16, NOTHING, "too much")]
    assert knee(Axis.RATE, points) == "Saturated at rate 16: too much; the knee is at rate 8."
    assert "No knee up to rate 8" in knee(Axis.RATE, points[:2])
    assert "no lower point" in knee(Axis.RATE, points[2:])
    assert knee(Axis.CONTEXT, points[:2]) == ""
    assert Point(65536, NOTHING).label == "64k" and Point(1.5, NOTHING).label == "1.5"


async def test_a_sweep_runs_to_the_knee_and_not_beyond(serve: Serve) -> None:
    prompts: list[tuple[int, ...]] = []

    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        prompts.append(tuple(request.prompt.tokens.ids))
        for event in keep_contract(request):
            yield event

    async def swept(text: str, **changes: object) -> Series:
        return await run_series(
            plan(address, **changes),
            Access(),
            parse_sweep(text),
            objectives=parse_objectives("ttft=1ms") if text.startswith("rate") else (),
            max_lag_s=60,
        )

    address = await serve(script)
    contexts = await swept("context=16..128")
    assert [point.value for point in contexts.points] == [16, 32, 64, 128]
    for point, run in zip(contexts.points, contexts.runs, strict=True):
        assert {r.prompt_tokens + 5 for r in run.records} == {point.value}
        assert point.report.whole == 4 and not point.saturated
    assert len({ids[:8] for ids in prompts}) == len(prompts)  # none begins as another does
    assert contexts.knee == ""
    prompts.clear()
    with pytest.raises(InvalidRequest, match="context of 1024"):
        await swept("context=512..2k")
    assert not prompts  # the first points would have fitted
    # Nobody gets a first token within a millisecond of a call.
    rates = await swept("rate=50..200", requests=8, warmup=0)
    assert len(rates.points) == 1 and rates.points[0].saturated
    assert rates.knee.startswith("Saturated at rate 50")
