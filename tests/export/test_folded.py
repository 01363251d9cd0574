"""Bundles whose layers are full, fold and slide side by side."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from concertina.bundle import resources
from concertina.bundle.manifest import read_manifest
from concertina.v1 import bundle_pb2 as pb
from export.bundle import StatePrecision, export_bundle
from export.weights import load_decoder
from model.data import Dataset, DatasetInfo
from model.layers.architecture import Folding
from tests.checkpoints import FOLDED, checkpoint_of, export_tiny, folded_config, write_checkpoint

INFO = DatasetInfo("text", 7, "noise", "CC0-1.0")
KEPT = [
    pair if pair in ((0, 0), (1, 2)) else pytest.param(*pair, marks=pytest.mark.slow)
    for pair in itertools.product((0, 1), (0, 1, 2))
]


@pytest.mark.parametrize(("sink", "window"), KEPT)
def test_graphs_are_the_model(sink: int, window: int, tmp_path: Path) -> None:
    """Export compares every prefix, chunks, and a batch of mixed phases, in float64."""
    layers = ("full", "fold", "window") if window else ("full", "fold")
    config = folded_config(Folding(layers, sink, window, "fitted"), context=8 * 16, span=16)
    checkpoint = write_checkpoint(tmp_path / "run", config, INFO)
    manifest = export_bundle(checkpoint, tmp_path / "bundle", name="tiny")
    assert manifest.parity.max_error < 1e-4
    folds = manifest.fold
    assert (folds.span, folds.keep_first, folds.keep_newest) == (16, sink, window)
    assert not folds.resets and not folds.binary
    kept = [resources.kept_entries(t) for t in manifest.state if t.name.startswith("keys")]
    assert kept == [16, 1, 0][: len(layers)]
    assert load_decoder(tmp_path / "bundle").config == config


def test_the_manifest_counts_bytes_of_each_kind(tiny_bundles: Path) -> None:
    manifest = read_manifest(export_tiny(tiny_bundles, "folded:tangent"))
    assert manifest.attention == "folded:tangent"
    entry = 2 * 2 * 8 * 4  # keys and values of two heads of 8 channels in float32
    for pushed in range(33):
        # of the complete blocks, one is the first and one the newest
        folded = max(0, pushed // 8 - 2)
        entries = [pushed - 7 * folded, pushed, pushed - 8 * folded]
        pooled = 4 * 8 * 4
        assert resources.state_bytes(manifest, pushed) == entry * sum(entries) + pooled
    peaks = [resources.peak_entries(manifest, 32, kept) for kept in (1, 8, 0)]
    assert peaks == [25, 32, 24]
    assert [t.shape[1] for t in manifest.state if t.name.startswith("keys")] == peaks
    most = resources.peak_state_bytes(manifest, 32)
    assert most == entry * sum(peaks) + pooled


def test_work_grows_with_what_each_layer_reads(tiny_bundles: Path) -> None:
    manifest = read_manifest(export_tiny(tiny_bundles, "folded:tangent"))
    entry = manifest.cost.step_entry
    work = [resources.step_flops(manifest, position) for position in range(31)]
    # Block 2 is full at 24 tokens: then block 1 becomes one entry in one layer, none in another.
    assert work[24] - work[22] == entry * (3 * 2 - 7 - 8) // 3
    assert work[23] == work[22] + entry + manifest.cost.fold


@pytest.mark.parametrize("pattern", FOLDED)
def test_other_types_of_state_are_refused_by_name(pattern: str, tiny_bundles: Path) -> None:
    run = checkpoint_of(export_tiny(tiny_bundles, pattern))
    data = Dataset(INFO, *([0] * 2000,) * 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in float32 only: leave --state out"):
        export_bundle(run, run / "no", name="no", data_type=pb.DATA_TYPE_FLOAT16)
    with pytest.raises(ValueError, match="in float32 only: leave --state out"):
        export_bundle(run, run / "no", name="no", state_precision=StatePrecision(data))
    assert not (run / "no").exists()
