"""Both promises at a reduced size, and a broken one gets noticed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtest.bench import measure_scale
from loadtest.bench.measure_scale import (
    NOISE_BYTES,
    LongStream,
    ManyStreams,
    app,
    measure_many,
    measure_stream,
)
from loadtest.bench.plan import Shape

_STREAM = LongStream(10, (5_000_000, 5_100_000, 6_000_000), (9.0, 1.0, 1.0), (2.0, 1.0, 1.2), 10**6)
_MANY = ManyStreams(400, 65_536, 64, 16_000_000, 7 << 30, 100.0)


@pytest.mark.chaos
def test_a_long_stream_takes_its_state_and_no_longer_at_the_end() -> None:
    shape = Shape(layers=2, width=64, heads=2, mlp=128)
    found = measure_stream(tokens=60_000, window=3_000, span=64, shape=shape)
    assert len(found.resident) == len(found.cpu_seconds) == 20
    assert found.predicted == ((60_000 // 64 + 60_000 % 64) - (3_000 // 64 + 3_000 % 64)) * 1024
    assert found.complaints() == []


@pytest.mark.chaos
def test_many_streams_stand_deep_in_their_contexts() -> None:
    shape = Shape(layers=2, width=64, heads=2, mlp=128)
    found = measure_many(40, context=4096, span=64, steps=64, threads=1, shape=shape)
    assert found.state_bytes == 2 * 2 * (4096 // 64 - 1 + 64) * 64 * 4 + 2 * 64 * 4
    assert found.tokens_per_second > 0
    assert found.complaints() == []
    assert found.peak_resident > 41 * found.state_bytes


def test_growth_beside_the_state_and_slowness_are_reported() -> None:
    assert _STREAM.growth == _STREAM.predicted
    assert _STREAM.slowdown == pytest.approx(1.2)
    assert _STREAM.complaints() == []
    (complaint,) = replace(_STREAM, resident=(0, 10**6 + NOISE_BYTES + 1, 0)).complaints()
    assert "the process grew by 3097153 bytes after the first 10 tokens" in complaint
    (complaint,) = replace(_STREAM, cpu_seconds=(1.0, 1.0, 1.6)).complaints()
    assert "1.60 times as long at the end" in complaint


@pytest.mark.parametrize(("resident", "code"), [(8 << 30, 0), ((8 << 30) + 1, 1)])
def test_the_exit_code_says_whether_the_promise_holds(
    resident: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = replace(_MANY, peak_resident=resident)
    monkeypatch.setattr(measure_scale, "measure_many", lambda *_: found)
    figures = tmp_path / "many.json"
    ran = CliRunner().invoke(app, ["many", "--json", str(figures)])
    assert ran.exit_code == code
    assert "8.00 GiB resident at most, 100.0 tokens/s" in ran.output
    assert json.loads(figures.read_text())["peak_resident"] == resident
