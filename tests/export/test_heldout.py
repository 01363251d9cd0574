"""Caches in int8: units that fit, graphs that are proven, losses that are measured and limited."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from concertina.bundle.manifest import read_manifest
from concertina.cli.main import main
from concertina.v1 import bundle_pb2 as pb
from export.bundle import LossError, Precision, StatePrecision, export_bundle, narrow_caches
from export.graphs import CACHES, LARGEST, Units, state_tensors
from export.heldout import cache_units, heldout_bits
from export.parity import ParityError, check_parity
from export.quantise import pack_weights
from export.streaming import Graphs, prefill
from export.weights import load_decoder
from export.windows import calibration_windows, windows_of
from model.data import Dataset, save_dataset
from tests.checkpoints import checkpoint_of, export_tiny


def units_of(bundle: Path, dataset: Dataset) -> Units:
    manifest = read_manifest(bundle)
    return cache_units(bundle, manifest, calibration_windows(dataset, manifest.context))


def test_a_unit_covers_entries_of_tokens_and_summaries(
    fixed_bundle: Path, heldout: Dataset
) -> None:
    manifest, units = read_manifest(fixed_bundle), units_of(fixed_bundle, heldout)
    caches = [tensor.name for tensor in manifest.state if tensor.name.split(".")[0] in CACHES]
    assert sorted(units) == sorted(caches)
    graphs, reached = Graphs(fixed_bundle, manifest), dict.fromkeys(caches, 0.0)
    for inputs in calibration_windows(heldout, manifest.context):
        for end in range(1, manifest.context):
            stream = graphs.start(1)
            prefill(graphs, stream, inputs[:, :end], 8, None)
            for name in caches:
                entries = stream.state[name][0, :, : stream.lengths[0]]
                share = np.abs(entries / units[name].numpy()) / LARGEST
                reached[name] = max(reached[name], float(share.max()))
        if inputs.max() < manifest.vocabulary + 1 and min(reached.values()) > 0.999:
            break
    assert all(0.99 < share < 1.001 for share in reached.values()), reached


def test_windows_have_tokens_that_the_data_has_not(heldout: Dataset) -> None:
    rare = Dataset(heldout.info, np.zeros_like(heldout.train), heldout.heldout)
    *data, last = calibration_windows(rare, 32)
    assert {token for window in data for token in np.unique(window[:, 1:])} == {0}
    assert len(np.unique(last[:, 1:])) == heldout.info.vocabulary


@pytest.mark.usefixtures("ready_graphs")
@pytest.mark.parametrize("bits", [None, 8])
def test_what_is_exported_is_small_proven_and_measured(
    bits: int | None, fixed_bundle: Path, heldout: Dataset, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    export_bundle(
        checkpoint_of(fixed_bundle),
        folder,
        name="small",
        precision=Precision(bits, heldout, max_loss=1) if bits else None,
        state_precision=StatePrecision(heldout, max_loss=0.2),
    )
    manifest, before = read_manifest(folder), read_manifest(fixed_bundle)
    for tensor, other in zip(manifest.state, before.state, strict=True):
        small = tensor.name.split(".")[0] in CACHES
        assert tensor.data_type == (pb.DATA_TYPE_INT8 if small else pb.DATA_TYPE_FLOAT32)
        assert (tensor.name, [*tensor.shape]) == (other.name, [*other.shape])
    noted = manifest.state_quantisation
    assert noted.tokens == 12 * 32
    assert 0 < abs(noted.heldout - noted.heldout_float32) < 0.2
    windows = windows_of(heldout, manifest.context)
    assert noted.heldout == heldout_bits(folder, manifest, windows)[0]
    assert 0 < noted.parity.max_error < noted.parity.tolerance
    assert manifest.parity.tolerance == 1e-4
    assert manifest.quantisation.bits == (bits or 0)
    if bits:
        assert noted.heldout_float32 == pytest.approx(manifest.quantisation.heldout)


@pytest.mark.usefixtures("ready_graphs")
def test_too_much_loss_writes_nothing(fixed_bundle: Path, heldout: Dataset, tmp_path: Path) -> None:
    with pytest.raises(LossError, match=r"int8 caches need .* use --state float32, or raise"):
        export_bundle(
            checkpoint_of(fixed_bundle),
            tmp_path / "bundle",
            name="new",
            state_precision=StatePrecision(heldout, max_loss=-9.0),
        )
    assert list(tmp_path.iterdir()) == []
    assert StatePrecision(heldout).limit == 0.01


@pytest.mark.parametrize("pattern", ["logsparse", "mixture"])
def test_patterns_with_histories_are_refused_by_name(pattern: str, tiny_bundles: Path) -> None:
    model = load_decoder(export_tiny(tiny_bundles, pattern))
    with pytest.raises(ValueError, match=f"the pattern {pattern} cannot .* history"):
        state_tensors(model, pb.DATA_TYPE_INT8)


@pytest.fixture(scope="module")
def narrowed(
    fixed_bundle: Path, heldout: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`fixed_bundle` with int8 caches; the manifest of the copy does not list its files."""
    folder = Path(shutil.copytree(fixed_bundle, tmp_path_factory.mktemp("narrowed") / "bundle"))
    model = load_decoder(fixed_bundle)
    narrow_caches(folder, read_manifest(folder), model, units_of(fixed_bundle, heldout), {})
    return folder


@pytest.mark.parametrize("graph", [None, "step.onnx", "fold.onnx"])
def test_parity_tells_a_wrong_unit_from_rounding(
    graph: str | None, narrowed: Path, fixed_bundle: Path, heldout: Dataset, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(narrowed, tmp_path / "copy"))
    manifest, model = read_manifest(fixed_bundle), load_decoder(fixed_bundle)
    del manifest.state[:]
    manifest.state.extend(state_tensors(model, pb.DATA_TYPE_INT8))
    units = units_of(fixed_bundle, heldout)
    if graph is None:
        assert check_parity(folder, manifest, model, units=units).max_error > 0
        return
    proto = onnx.load(folder / graph)
    (unit,) = (t for t in proto.graph.initializer if t.name == "lifted_tensor_0.half")
    doubled = (numpy_helper.to_array(unit) * 2).astype(np.float16)
    unit.CopyFrom(numpy_helper.from_array(doubled, unit.name))
    onnx.save(proto, folder / graph)
    with pytest.raises(ParityError, match="differ"):
        check_parity(folder, manifest, model, units=units)


def test_packed_matrices_stay_packed(fixed_bundle: Path, heldout: Dataset, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fixed_bundle, tmp_path / "copy"))
    model, manifest = load_decoder(fixed_bundle), read_manifest(fixed_bundle)
    packed = pack_weights(model, 8)
    narrow_caches(folder, manifest, model, units_of(fixed_bundle, heldout), packed)
    kinds = [node.op_type for node in onnx.load(folder / "step.onnx").graph.node]
    assert kinds.count("MatMulNBits") == len(packed)
    with torch.no_grad():
        for name, weight in load_decoder(folder).named_parameters():
            assert torch.equal(weight, model.get_parameter(name)), name


@pytest.mark.usefixtures("ready_graphs")
def test_command(
    fixed_bundle: Path,
    heldout: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_dataset(tmp_path / "data", heldout)
    paths = [str(checkpoint_of(fixed_bundle)), str(tmp_path / "bundle")]

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["concertina", "export", *paths, *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        assert isinstance(exit.value.code, int)
        return exit.value.code, " ".join(capsys.readouterr().err.split())

    code, err = run("--state", "int8")
    assert code and "int8 caches need" in err and "--data" in err
    data = ("--data", str(tmp_path / "data"))
    code, err = run("--state", "int8", "--max-loss", "0.2", *data)
    assert code == 0 and "int8 caches: " in err and "against float32, over 384 tokens" in err
    assert read_manifest(tmp_path / "bundle").state[0].data_type == pb.DATA_TYPE_INT8
