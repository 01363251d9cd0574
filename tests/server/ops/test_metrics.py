from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from prometheus_client import REGISTRY

from concertina.bundle.resources import KIND_NAMES
from server.bundles.bundle import Bundle
from server.checkpoint import Finish
from server.errors import Overloaded
from server.ops import metrics
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
    monkeypatch.setattr(metrics, "GAUGE_INTERVAL_S", 0.0)  # after every step
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
    monkeypatch.setattr(metrics, "GAUGE_INTERVAL_S", 0.0)  # after every step

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
