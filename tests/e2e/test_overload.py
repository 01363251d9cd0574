"""Ten times more than it can do: a server does as much as it can, and refuses the rest at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from concertina.client.channel import Access
from loadtest.measure import Plan, measure
from loadtest.reports.report import Report, summarise
from loadtest.workload import Lengths
from tests.e2e.servers import ROOT, Server, serving

SLOTS, TOKENS = 8, 128
SECONDS = 10.0
ATTEMPTS = 3


def _run(server: Server, rate: float | None) -> Report:
    """A closed loop that fills every slot, or an open one; each stream is checked."""
    plan = Plan(
        address=server.address,
        model="",
        streams=SLOTS,
        rate=rate,
        channels=4,
        requests=None,
        duration_s=SECONDS,
        prompt_tokens=Lengths(16, 16),
        output_tokens=Lengths(TOKENS, TOKENS),
        prompts=(),
        warmup=SLOTS if rate is None else 0,
        seed=1,
        timeout_s=120.0,
    )
    _, run = asyncio.run(measure(plan, Access()))
    return summarise(run, max_lag_s=1.0)


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize("limit", ["--queue-limit=8", "--queue-tokens=128", "--state-limit-bytes"])
def test_ten_times_the_load_costs_no_goodput(limit: str) -> None:
    """Whatever limit it runs into. Other programs disturb a window, so the best of some counts."""
    if limit == "--state-limit-bytes":
        limit += f"={2 * SLOTS * _most_state()}"
    options = ("--slots", str(SLOTS), "--threads", "1", "--local", limit)
    with serving(str(ROOT / "bundles" / "python-4k"), *options) as server:
        goodputs = []
        for _ in range(ATTEMPTS):
            before = _run(server, None)
            overload = _run(server, 10 * before.requests_per_s)
            after = _run(server, None)
            for report in (before, overload, after):
                assert not report.num_violations, report.violations
            assert set(overload.failures) == {"Overloaded RESOURCE_EXHAUSTED"}
            assert overload.refused > overload.whole
            assert not overload.without_retry_after
            assert overload.refusal_s is not None and overload.refusal_s.p50 < 0.05
            capacity = (before.goodput_tokens_per_s + after.goodput_tokens_per_s) / 2
            goodputs.append(overload.goodput_tokens_per_s / capacity)
            print(f"{limit}: goodput {goodputs[-1]:.3f} of {capacity:.0f} tokens/s;")
            print(f"{overload.refused} refusals in {overload.refusal_s}")
            if goodputs[-1] >= 0.9:
                return
        raise AssertionError(f"goodput at ten times the load, of that at capacity: {goodputs}")


def _most_state() -> int:
    """Bytes that one stream of these tests may come to hold."""
    from concertina.bundle.manifest import read_manifest
    from concertina.bundle.resources import peak_state_bytes

    return peak_state_bytes(read_manifest(Path(ROOT / "bundles" / "python-4k")), 16 + TOKENS)
