"""Growth is what the design promises, and what breaks a promise is reported."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from torch import Tensor

from export.growth import measure
from export.growth.measure import complaints, exponents, fit_streams, main
from export.growth.streams import Sample, measure_streams
from export.growth.training import Peak, measure_training
from model.attention import future, softmax
from model.patterns import PATTERNS
from model.patterns.full import Full

_ENTRY_BYTES = 3 * 2 * 8 * 4
"""Query, key and value of 2 heads of 8 float32."""


class Materialised(Full):
    """Full attention that keeps its L x L weights."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        hidden = future(q.shape[2], q.device)
        return softmax((q @ k.transpose(-1, -2)).masked_fill(hidden, float("-inf"))) @ v


@pytest.mark.slow
def test_fixed_grows_slower_than_the_square_and_what_does_not_is_reported() -> None:
    fixed = measure_training({"fixed": PATTERNS["fixed"]}, [1024, 4096], heads=8)
    planted = measure_training({"full": Materialised}, [512, 2048], heads=8)
    assert min(peak.bytes for peak in fixed + planted) > 5e6, "too little to tell from noise"
    assert 1.0 < exponents(fixed)["fixed"] < 1.7
    assert complaints(exponents(fixed), []) == []
    (complaint,) = complaints(exponents(planted), [])
    assert "full: training memory grows with L^" in complaint


@pytest.mark.slow
def test_streams_weigh_what_the_manifest_says() -> None:
    samples = measure_streams([256, 1024])
    assert complaints({}, samples) == []
    fits = fit_streams(samples)
    assert fits["fixed_exponent"] == pytest.approx(0.5, abs=0.05)
    assert fits["full_exponent"] == pytest.approx(1.0, abs=0.05)
    hierarchical = [s for s in samples if s.attention == "logsparse-hierarchical"]
    assert {s.pushed.bit_count() for s in hierarchical} == set(range(1, 11))
    for sample in hierarchical:
        assert sample.allocated == _ENTRY_BYTES * sample.pushed.bit_count()


def _peaks(exponent: float) -> list[Peak]:
    return [Peak("fixed", length, int(length**exponent)) for length in (1024, 4096, 16384)]


def _samples(excess: int) -> list[Sample]:
    """As measured, but one of them off by `excess` bytes; the last of full is only computed."""
    samples = []
    for context in (256, 1024):
        end, span = context - 1, int(context**0.5)
        full, fixed, bits = 128 * end, 256 * span, _ENTRY_BYTES * end.bit_count()
        samples += [
            Sample("fixed", context, end, fixed, fixed),
            Sample("full", 4096, end, full, full),
            Sample("logsparse-hierarchical", 4096, end, bits + excess * (end == 255), bits),
            Sample("logsparse-hierarchical", 4096, end - 1, bits - _ENTRY_BYTES, bits - 192),
        ]
    return [*samples, Sample("full", 4096, 4095, None, 128 * 4095)]


@pytest.mark.parametrize(
    ("exponent", "excess", "complains"),
    [
        (1.5, 0, ""),
        (1.95, 0, "fixed: training memory grows with L^1.95"),
        (1.5, 4, "logsparse-hierarchical, context 4096: 1540 bytes after 255 tokens"),
    ],
)
def test_the_exit_code_says_whether_the_promises_hold(
    exponent: float,
    excess: int,
    complains: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(measure, "measure_training", lambda *_: _peaks(exponent))
    monkeypatch.setattr(measure, "measure_streams", lambda *_: _samples(excess))
    figures, images = tmp_path / "new" / "growth.json", tmp_path / "images"
    argv = ["measure.py", "--json", str(figures), "--images", str(images)]
    monkeypatch.setattr("sys.argv", argv)
    assert main() == (1 if complains else 0)
    table, complaint = capsys.readouterr()
    assert complains in complaint and bool(complaint.strip()) == bool(complains)
    assert f"| {exponent:.2f}{' **L x L**' if exponent > 1.9 else ''} |" in table
    assert "| 1,023 | 8,192 B | 130,944 B | 1,920 B |" in table
    read = json.loads(figures.read_text())
    assert read["training_exponents"]["fixed"] == pytest.approx(exponent, abs=0.01)
    assert [Sample(**sample) for sample in read["streams"]] == _samples(excess)
    for name in ("state-growth.svg", "training-memory.svg"):
        assert ElementTree.parse(images / name).getroot().tag.endswith("svg")
