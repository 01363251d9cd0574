"""Bundles whose layers are full, fold and slide side by side."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from concertina.bundle import resources
from concertina.bundle.manifest import read_manifest
from export.bundle import Precision, StatePrecision, export_bundle
from export.graphs import LARGEST
from export.heldout import cache_units, heldout_bits, turning_pairs
from export.parity import ParityError, check_parity
from export.streaming import Graphs, prefill
from export.weights import load_decoder
from export.windows import windows_of
from model.data import Dataset, DatasetInfo
from model.layers.architecture import Folding
from tests.checkpoints import (
    FOLDED,
    checkpoint_of,
    export_tiny,
    folded_config,
    narrow_tiny,
    tiny_units,
    write_checkpoint,
)
from tests.export.conftest import copy_graphs

slow = pytest.mark.slow
EACH = [p if p == "folded:fitted" else pytest.param(p, marks=slow) for p in FOLDED]
INFO = DatasetInfo("text", 7, "noise", "CC0-1.0")
KEPT = [
    pair if pair in ((0, 0), (1, 2)) else pytest.param(*pair, marks=slow)
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
    assert folds.resets and not folds.binary
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


@pytest.mark.parametrize("bits", [None, pytest.param(4, marks=slow)])
@pytest.mark.parametrize("pattern", EACH)
def test_caches_in_int8_are_small_proven_and_measured(
    pattern: str,
    bits: int | None,
    tiny_bundles: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = export_tiny(tiny_bundles, pattern)
    copy_graphs(before, monkeypatch)
    tokens = np.random.default_rng(1).integers(7, size=2000).astype(np.uint8)
    data, folder = Dataset(INFO, tokens[:1600], tokens[1600:]), tmp_path / "small"
    export_bundle(
        checkpoint_of(before),
        folder,
        name="small",
        precision=Precision(bits, data, max_loss=9) if bits else None,
        state_precision=StatePrecision(data, max_loss=9),
    )
    manifest, plain = read_manifest(folder), read_manifest(before)
    noted = manifest.state_quantisation
    assert 0 < noted.parity.max_error < noted.parity.tolerance
    assert noted.tokens == 12 * 32
    assert 0 < abs(noted.heldout - noted.heldout_float32) < 0.3
    assert noted.heldout == heldout_bits(folder, manifest, windows_of(data, 32))[0]
    assert manifest.quantisation.bits == (bits or 0)
    pooled = 4 * 8 * 4
    for pushed in range(33):
        caches = resources.state_bytes(plain, pushed) - pooled
        assert resources.state_bytes(manifest, pushed) == caches // 4 + pooled


def test_a_unit_covers_every_kind_of_entry(tiny_bundles: Path) -> None:
    """Tokens and summaries, in layers whose stacks have other lengths."""
    for pattern in FOLDED:
        bundle = export_tiny(tiny_bundles, pattern)
        manifest = read_manifest(bundle)
        tokens = np.random.default_rng(3).integers(7, size=(1, 32))
        units = cache_units(bundle, manifest, [tokens])
        graphs, reached = Graphs(bundle, manifest), dict.fromkeys(units, 0.0)
        for end in range(1, 32):  # what the last token folds is read by none
            stream = graphs.start(1)
            prefill(graphs, stream, tokens[:, :end], 8, None)
            for tensor in manifest.state:
                if tensor.name not in units:
                    continue
                count = resources.entries(manifest, end, resources.kept_entries(tensor))
                entries = stream.state[tensor.name][0, :, :count]
                share = np.abs(entries / units[tensor.name].numpy()).max() / LARGEST
                reached[tensor.name] = max(reached[tensor.name], float(share))
        assert all(0.99 < share < 1.001 for share in reached.values()), (pattern, reached)


def test_keys_of_later_tokens_fit_in_their_units(tiny_bundles: Path) -> None:
    """They point elsewhere than those of the windows that the units are made of."""
    bundle = export_tiny(tiny_bundles, "folded:max")  # its first layer is full
    manifest, token = read_manifest(bundle), np.full((1, 32), 3)
    turning = turning_pairs(load_decoder(bundle))
    assert turning == 4
    graphs, shares = Graphs(bundle, manifest), []
    for pairs in (0, turning):
        units = cache_units(bundle, manifest, [token[:, :4]], pairs)
        stream = graphs.start(1)
        prefill(graphs, stream, token, 8, None)
        keys = np.abs(stream.state["keys.0"][0] / units["keys.0"].numpy()) / LARGEST
        shares.append(float(keys.max()))
    assert shares[0] > 2 and 0.9 < shares[1] < 1.001


@pytest.mark.parametrize("graph", [None, "step.onnx", "fold.onnx"])
def test_parity_tells_wrong_units_of_summaries_from_rounding(
    graph: str | None, tiny_bundles: Path, tmp_path: Path
) -> None:
    plain = export_tiny(tiny_bundles, "folded:fitted")
    folder = Path(shutil.copytree(narrow_tiny(plain), tmp_path / "copy"))
    manifest, model = read_manifest(folder), load_decoder(plain)
    units = tiny_units(plain, model)
    if graph is None:
        assert check_parity(folder, manifest, model, units=units).max_error > 0
        return
    proto = onnx.load(folder / graph)
    unit = next(t for t in proto.graph.initializer if [*t.dims] == [2, 1, 8])
    doubled = numpy_helper.to_array(unit) * 2
    unit.CopyFrom(numpy_helper.from_array(doubled, unit.name))
    onnx.save(proto, folder / graph)
    with pytest.raises(ParityError, match="differ"):
        check_parity(folder, manifest, model, units=units)
