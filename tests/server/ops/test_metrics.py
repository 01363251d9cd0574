from __future__ import annotations

import platform
from collections.abc import Callable

import numpy as np
import pytest
from prometheus_client import REGISTRY, generate_latest

import concertina
from concertina.bundle.resources import KIND_NAMES
from server.bundles.bundle import Bundle
from server.checkpoint import Finish, FinishReason
from server.engine.admission import Pace, Weight, check
from server.engine.updates import HandedOver, Scored, outcome
from server.errors import Overloaded, StepFailed
from server.ops import engine_metrics
from server.ops.engine_metrics import EngineMetrics, Lived
from tests.server.engines import (
    DrivenModel,
    Gate,
    ask,
    change_logits,
    generate,
    read,
    script,
    together,
    until,
)

Start = Callable[..., DrivenModel]


def value_of(name: str, **labels: str) -> float:
    labels = {"model_name": "tiny-text", **labels}
    return REGISTRY.get_sample_value(f"concertina_{name}", labels) or 0.0


def _counts() -> dict[str, float]:
    """All counters."""
    finished = ("max_tokens", "stop", "end", "time_limit", "scored", "cancelled", "error")
    return {
        "prompt": value_of("prompt_tokens_total"),
        "generated": value_of("generation_tokens_total"),
        "folds": value_of("folds_total"),
        "first tokens": value_of("time_to_first_token_seconds_count"),
        "gaps": value_of("inter_token_latency_seconds_count"),
        "queued": value_of("stream_queue_time_seconds_count"),
        "ended": value_of("e2e_stream_latency_seconds_count"),
        "steps": value_of("step_seconds_count", phase="decode"),
        "chunks": value_of("step_seconds_count", phase="prefill"),
        "rows": value_of("step_batch_size_sum"),
        "refused": value_of("requests_refused_total", reason="queue_full"),
        **{why: value_of("streams_finished_total", finished_reason=why) for why in finished},
    }


def _grown(before: dict[str, float]) -> dict[str, float]:
    return {name: n - before[name] for name, n in _counts().items() if n != before[name]}


async def test_metrics_of_a_stream(text: Bundle, start: Start) -> None:
    """A prompt of 11 and 10 tokens more: 21 are pushed, 11 of them in two chunks, 2 blocks fold."""
    model, before = start(text), _counts()
    await generate(model, ask(b"some prompt", max_tokens=10))
    await until(lambda: value_of("streams_running") == 0)
    assert _grown(before) == {
        "prompt": 11,
        "generated": 10,
        "folds": 2,
        "first tokens": 1,
        "gaps": 9,
        "queued": 1,
        "ended": 1,
        "steps": 10,
        "chunks": 2,
        "rows": 10,
        "max_tokens": 1,
    }


async def test_a_step_counts_once_and_its_tokens_all(text: Bundle, start: Start) -> None:
    model, before = start(text), _counts()
    with together(model):
        streams = [model.submit(ask(max_tokens=5)) for _ in range(3)]
    for stream in streams:
        await read(model, stream)
    grown = _grown(before)
    assert [grown[name] for name in ("steps", "rows", "generated", "gaps")] == [5, 15, 15, 4]


async def test_steps_show_while_their_stream_runs(
    text: Bundle, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_metrics, "GAUGE_INTERVAL_S", 0.0)  # after every step
    model, before = start(text), _counts()
    with Gate(model) as gate:
        stream = model.submit(ask(max_tokens=20))
        gate.let(4)
        await until(lambda: _grown(before).get("steps") == 4)
        assert _grown(before)["generated"] == 4
        gate.let(float("inf"))
        await read(model, stream)


async def test_idle_time_is_not_a_slow_step(text: Bundle, start: Start) -> None:
    model, before = start(text), _counts()
    for _ in range(2):
        await generate(model, ask(max_tokens=5))
        await until(lambda: model.engine.decoding.is_resting, limit_s=10)
    assert _grown(before)["gaps"] == 2 * 4


async def test_metrics_of_a_score(text: Bundle, start: Start) -> None:
    model, before = start(text), _counts()
    await generate(model, ask(b"x" * 16, score=True))
    assert _grown(before) == {
        "prompt": 16, "folds": 2, "queued": 1, "ended": 1, "chunks": 2, "scored": 1
    }  # fmt: skip


async def test_why_streams_ended(text: Bundle, start: Start) -> None:
    model, before = start(text, slots=1, queue_limit=1, stream_buffer=20), _counts()
    script(model, b"one two".ljust(text.context))
    for fields in (
        {"stop": ("two",)},
        {"stop_tokens": frozenset(b"w")},
        {"end_tokens": frozenset({ord("w")})},
    ):
        await generate(model, ask(max_tokens=9, **fields))
    await generate(model, ask(max_tokens=90, time_limit_s=1e-6))
    stalled = model.submit(ask(max_tokens=90))
    await until(lambda: stalled.paused)
    model.cancel(stalled)
    await until(lambda: stalled.ended)
    change_logits(model, lambda logits, _: logits * np.nan)
    await generate(model, ask())
    with Gate(model) as gate:
        streams = [model.submit(ask()) for _ in range(2)]
        with pytest.raises(Overloaded):
            model.submit(ask())
        gate.let(float("inf"))
        for stream in streams:
            await read(model, stream)
    grown = _grown(before)
    reasons = ("stop", "end", "time_limit", "cancelled", "error", "refused", "ended")
    assert [grown[why] for why in reasons] == [2, 1, 1, 1, 3, 1, 8]


async def test_metrics_of_what_an_engine_holds(
    text: Bundle, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_metrics, "GAUGE_INTERVAL_S", 0.0)  # after every step

    def held() -> dict[str, float]:
        return {
            **{where: value_of(f"streams_{where}") for where in ("running", "waiting", "paused")},
            **{kind: value_of("state_bytes", kind=kind) for kind in KIND_NAMES.values()},
        }

    model = start(text, slots=2, stream_buffer=10)
    assert value_of("state_buffer_bytes") == 3 * text.max_state_bytes
    with Gate(model) as gate:
        with together(model):
            streams = [model.submit(ask(max_tokens=n)) for n in (12, 30, 30)]
        await gate.held("step")
        await gate.let_one("step")
        await gate.let_one("step")
        one = text.state_bytes(2)
        assert held() == {"running": 2, "waiting": 1, "paused": 0} | {
            k: 2 * n for k, n in one.items()
        }
        gate.let(7)
        await gate.held("step")
        gate.let(1)  # the tenth token: both readers lag, and the third stream gets a slot
        await until(lambda: held()["paused"] == 2)
        await gate.held("step")
        await gate.let_one("step")
        assert held() == {"running": 1, "waiting": 0, "paused": 2} | text.state_bytes(1)
    for stream in streams:
        await read(model, stream)
    await until(lambda: not any(held().values()))
    assert (REGISTRY.get_sample_value("concertina_process_resident_memory_bytes") or 0) > 1e7


async def test_times_are_seconds(text: Bundle, start: Start) -> None:
    names = ("time_to_first_token", "inter_token_latency", "e2e_stream_latency")
    before = [value_of(f"{name}_seconds_sum") for name in names]
    ending = (await generate(start(text), ask(max_tokens=50))).ending
    assert isinstance(ending, Finish)
    first, gaps, whole = (
        value_of(f"{name}_seconds_sum") - sum_ for name, sum_ in zip(names, before, strict=True)
    )
    assert first == pytest.approx(ending.first_token_s)
    assert whole == pytest.approx(ending.total_s, abs=0.05)
    assert gaps == pytest.approx(ending.total_s - ending.first_token_s, rel=0.2)


def of_streams(name: str, what: str = "sum") -> float:
    return value_of(f"stream_{name}_{what}")


async def test_the_times_of_a_stream_are_those_of_its_parts(text: Bundle, start: Start) -> None:
    model = start(text)
    names = ("queue_time", "prefill_time", "decode_time", "inference_time")
    before = {name: of_streams(f"{name}_seconds") for name in names}
    tokens = [of_streams("prompt_tokens"), of_streams("generation_tokens")]
    per_token = of_streams("time_per_output_token_seconds")
    ending = (await generate(model, ask(b"some prompt", max_tokens=10))).ending
    assert isinstance(ending, Finish)
    grown = {name: of_streams(f"{name}_seconds") - n for name, n in before.items()}
    assert grown["queue_time"] == pytest.approx(ending.queue_s)
    first_s = grown["queue_time"] + grown["prefill_time"]
    assert first_s == pytest.approx(ending.first_token_s) and grown["prefill_time"] > 0
    parts_s = grown["prefill_time"] + grown["decode_time"]
    assert grown["inference_time"] == pytest.approx(parts_s) and grown["decode_time"] > 0
    seconds = of_streams("time_per_output_token_seconds") - per_token
    assert seconds == pytest.approx(grown["decode_time"] / 9)
    assert of_streams("prompt_tokens") - tokens[0] == 11
    assert of_streams("generation_tokens") - tokens[1] == 10


def lived(**changes: float | None) -> Lived:
    given = {"total_s": 9.0, "started_s": 1.0, "first_token_s": 3.0}
    return Lived(**{**given, "prompt_tokens": 5, "generated": 4, "preemptions": 2, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "grown"),
    [
        ({}, {"prefill": 2, "decode": 6, "inference": 8, "per token": 2}),
        ({"generated": 1}, {"prefill": 2, "decode": 6, "inference": 8}),
        # It went on here after its first token came from another server.
        ({"first_token_s": 0.5}, {"inference": 8}),
        ({"first_token_s": None}, {"inference": 8}),  # a score, or it ended before
        ({"first_token_s": None, "started_s": None}, {}),  # it never left the queue
    ],
)
def test_a_stream_counts_for_what_happened_here(
    changes: dict[str, float | None], grown: dict[str, float]
) -> None:
    def sums() -> dict[str, float]:
        names = ("prefill_time", "decode_time", "inference_time", "time_per_output_token")
        values = (of_streams(f"{name}_seconds") for name in names)
        return dict(zip(("prefill", "decode", "inference", "per token"), values, strict=True))

    before, preempted = sums(), of_streams("preemptions")
    EngineMetrics("tiny-text").finished("end", lived(**changes))
    found = {name: n - before[name] for name, n in sums().items() if n != before[name]}
    assert found == pytest.approx(grown)
    assert of_streams("preemptions") - preempted == 2


def test_a_step_with_drafts_counts_one_stream_and_all_its_tokens() -> None:
    engine, before = EngineMetrics("tiny-text"), _counts()
    tokens = value_of("step_tokens_sum")
    engine.stepped(1, 0.01, None, 4)
    engine.stepped(3, 0.01, 0.02)
    engine.observe()
    assert value_of("step_tokens_sum") - tokens == 4 + 3
    assert _grown(before) == {"generated": 7, "steps": 2, "rows": 4, "gaps": 1}


async def test_folds_of_the_batch_have_a_time(text: Bundle, start: Start) -> None:
    """A block is 8 tokens: of 20 that are drawn, two blocks fold; a prompt folds in its pass."""
    model, before = start(text), value_of("fold_seconds_count")
    await generate(model, ask(max_tokens=20))
    assert value_of("fold_seconds_count") - before == 2
    await generate(model, ask(b"x" * 16, score=True))
    assert value_of("fold_seconds_count") - before == 2


async def test_the_prefix_cache_says_what_was_looked_up(text: Bundle, start: Start) -> None:
    def counts() -> tuple[float, float]:
        return value_of("prefix_cache_queries_total"), value_of("prefix_cache_hits_total")

    model, before = start(text, prefix_cache_bytes=10**6), counts()
    for _ in range(2):
        await generate(model, ask(b"twenty tokens, yes!!", max_tokens=1))
    looked_up, found = (now - then for now, then in zip(counts(), before, strict=True))
    assert (looked_up, found) == (40, 16)
    without, before = start(text), counts()
    await generate(without, ask(b"twenty tokens, yes!!", max_tokens=1))
    assert counts() == before


async def test_usage_is_the_share_of_the_limit_that_may_be_needed(
    text: Bundle, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_metrics, "GAUGE_INTERVAL_S", 0.0)  # after every step
    held, limit = value_of("state_limit_bytes"), 10 * text.max_state_bytes
    model = start(text, state_limit_bytes=limit)
    assert value_of("state_limit_bytes") - held == limit
    with Gate(model) as gate:
        stream = model.submit(ask(max_tokens=20))
        await gate.held("step")
        await gate.let_one("step")
        assert value_of("state_usage_ratio") == text.peak_state_bytes(20) / limit
        gate.let(float("inf"))
        await read(model, stream)
    model.close()
    assert value_of("state_limit_bytes") == held and value_of("state_usage_ratio") == 0


async def test_what_is_served_is_named_while_it_is_served(text: Bundle, start: Start) -> None:
    labels = {
        "version": text.manifest.version,
        "fingerprint": text.fingerprint,
        "attention": text.manifest.attention,
    }
    before = value_of("model_info", **labels)
    model = start(text)
    assert value_of("model_info", **labels) == before + 1
    model.close()
    assert value_of("model_info", **labels) == before
    build = {"version": concertina.__version__, "python_version": platform.python_version()}
    assert REGISTRY.get_sample_value("concertina_build_info", build) == 1


def test_counters_are_there_before_they_count() -> None:
    EngineMetrics("just started")

    def there(name: str, **labels: str) -> bool:
        labels = {"model_name": "just started", **labels}
        return REGISTRY.get_sample_value(f"concertina_{name}_total", labels) == 0

    assert there("streams_preempted") and there("prefix_cache_queries")
    for ending in (
        *(Finish(reason, None, 1, 0, 0, 0, 0) for reason in FinishReason),
        *(Scored(()), HandedOver(), StepFailed("no"), None),
    ):
        assert there("streams_finished", finished_reason=outcome(ending)), ending
    for field in ("streams", "queue_tokens", "state_bytes"):
        refusal = check(Weight(), Weight(**{field: 2}), Weight(1, 1, 1), Pace(), 0.0)
        assert refusal is not None and there("requests_refused", reason=refusal.reason)


def test_nothing_says_when_it_was_made() -> None:
    assert b"_created" not in generate_latest()
