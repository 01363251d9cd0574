"""Matrices in few bits: packed as the kernel reads them, proven, measured, and served."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from concertina.bundle.manifest import read_manifest
from concertina.cli.main import main
from export.bundle import LossError, Precision, export_bundle
from export.packing import Packed, pack, unpack
from export.parity import ROUNDED_TOLERANCE, TOLERANCE, ParityError, check_parity
from export.quantise import BLOCK, pack_weights, quantise_step, round_activations
from export.weights import load_decoder, round_weights
from model.data import Dataset, save_dataset
from model.run import load_checkpoint
from tests.checkpoints import checkpoint_of
from tests.parity.served import Served, assert_parity, draw_tokens, expected_logits


def draw_matrix(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(rows * columns).standard_normal((rows, columns), np.float32)


@pytest.fixture(params=[8, 4])
def bits(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


@pytest.fixture
def quantised(
    bits: int, fixed_bundle: Path, heldout: Dataset, ready_graphs: None, tmp_path: Path
) -> Path:
    """`fixed_bundle` with matrices of `bits` bits."""
    export_bundle(
        checkpoint_of(fixed_bundle),
        tmp_path / "quantised",
        name="quantised",
        precision=Precision(bits, heldout, max_loss=1),
    )
    return tmp_path / "quantised"


@pytest.mark.parametrize("columns", [16, 128, 200])
def test_integers_lie_where_the_contract_says(bits: int, columns: int) -> None:
    packed = pack(draw_matrix(3, columns), bits, block=64)
    assert packed.block == 64
    assert packed.integers.shape == (3, -(-columns // 64), 8 * bits)
    expected = np.zeros((3, columns), np.float32)
    for row in range(3):
        for column in range(columns):
            block, inside = divmod(column, 64)
            if bits == 8:
                integer = int(packed.integers[row, block, inside]) - 128
            else:
                pair = int(packed.integers[row, block, inside // 2])
                integer = (pair >> 4 if inside % 2 else pair & 15) - 8
            expected[row, column] = integer * packed.scales[row, block]
    assert np.array_equal(unpack(packed), expected)


def multiply(x: np.ndarray, packed: Packed) -> np.ndarray:
    """`x` times the packed matrix, by the kernel."""
    node = helper.make_node(
        "MatMulNBits",
        ["x", "integers", "scales"],
        ["y"],
        domain="com.microsoft",
        N=len(packed.integers),
        K=packed.columns,
        bits=packed.bits,
        block_size=packed.block,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", packed.columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(packed.integers, "integers"),
            numpy_helper.from_array(packed.scales, "scales"),
        ],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    product: np.ndarray = session.run(None, {"x": x})[0]
    return product


@pytest.mark.parametrize(("rows", "columns"), [(7, 16), (24, 128), (5, 200)])
def test_the_kernel_reads_what_was_packed(bits: int, rows: int, columns: int) -> None:
    packed = pack(draw_matrix(rows, columns), bits, BLOCK)
    x = draw_matrix(3, columns)
    assert np.abs(multiply(x, packed) - x @ unpack(packed).T).max() < 1e-4


def test_what_fits_is_kept_exactly(bits: int) -> None:
    half = 1 << (bits - 1)
    matrix = np.random.default_rng(0).integers(-half, half, (5, 100)).astype(np.float32)
    matrix[:, 3], matrix[:, 70] = -half, -half
    matrix[1] *= -0.25  # the negative scale
    matrix[2] = 0
    assert np.array_equal(unpack(pack(matrix, bits, block=64)), matrix)


def test_scales_are_float16_and_lose_less_than_the_plain_ones(bits: int) -> None:
    matrix = draw_matrix(40, 128)
    packed = pack(matrix, bits, BLOCK)
    assert np.array_equal(packed.scales, packed.scales.astype(np.float16))
    plain = np.abs(matrix).max(axis=1, keepdims=True) / ((1 << (bits - 1)) - 1)
    error = np.square(unpack(packed) - matrix).sum()
    share = {8: 1, 4: 0.85}[bits]
    assert error < share * np.square(np.rint(matrix / plain) * plain - matrix).sum()


def test_the_manifest_says_what_was_stored_and_lost(quantised: Path, bits: int) -> None:
    manifest = read_manifest(quantised)
    noted = manifest.quantisation
    assert (noted.bits, noted.block, noted.tokens) == (bits, BLOCK, 12 * 32)
    assert 0 < manifest.parity.max_error < manifest.parity.tolerance == TOLERANCE
    assert 10 * TOLERANCE < noted.rounded_parity.max_error < noted.rounded_parity.tolerance
    assert noted.rounded_parity.positions == manifest.parity.positions
    assert 0 < abs(noted.heldout - noted.heldout_float16) < 0.1
    assert dict(manifest.metrics) == {"bits/dim": 8.0}


def test_held_out_bits_are_those_of_the_model(
    quantised: Path, fixed_bundle: Path, heldout: Dataset
) -> None:
    inputs = np.concatenate((np.full((12, 1), 7), heldout.heldout[:, 1:-1]), axis=1)
    targets = torch.from_numpy(heldout.heldout[:, 1:].astype(np.int64))
    bits = []
    for bundle in (fixed_bundle, quantised):
        chances = torch.from_numpy(expected_logits(bundle, inputs)).log_softmax(-1)
        bits.append(-chances.gather(-1, targets[..., None]).mean().item() / np.log(2))
    noted = read_manifest(quantised).quantisation
    assert noted.heldout_float16 == pytest.approx(bits[0], abs=1e-5)
    assert noted.heldout == pytest.approx(bits[1], abs=0.02)


def test_the_decoder_of_the_bundle_has_the_rounded_weights(
    quantised: Path, fixed_bundle: Path, bits: int
) -> None:
    model = load_checkpoint(checkpoint_of(fixed_bundle)).model
    round_weights(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = pack_weights(model, bits)
    loaded = load_decoder(quantised).state_dict()
    for name, expected in model.state_dict().items():
        assert torch.equal(loaded[name], expected), name
        assert torch.equal(expected, before[name]) == (name not in packed), name
    assert len(packed) == 2 * 4 + 1


def test_every_matrix_of_the_graph_is_packed(quantised: Path, bits: int) -> None:
    graph = onnx.load(quantised / "step.onnx").graph
    kernels = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(kernels) == 2 * 4 + 1
    for node in kernels:
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert (settings["bits"], settings["accuracy_level"]) == (bits, 4)
    assert not {"MatMul", "Gemm"} & {node.op_type for node in graph.node}
    floats = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT and t.dims}
    assert not any(name.endswith(".weight") and "norm" not in name for name in floats)


@pytest.mark.parametrize("part", [".integers", ".scales.half"])
def test_exact_activations_let_a_small_fault_be_seen(
    part: str, bits: int, copied: Path, fixed_bundle: Path
) -> None:
    manifest, model = read_manifest(copied), load_decoder(fixed_bundle)
    quantise_step(copied / "step.onnx", pack_weights(model, bits))
    assert check_parity(copied, manifest, model).max_error < 1e-5
    proto = onnx.load(copied / "step.onnx")
    tensor = [t for t in proto.graph.initializer if t.name.endswith(part)][-1]
    values = numpy_helper.to_array(tensor).copy()
    values.flat[1 if part == ".integers" else 0] += 1 if part == ".integers" else values.flat[0] / 8
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, copied / "step.onnx")
    with pytest.raises(ParityError, match=r"limit is 0\.0001"):
        check_parity(copied, manifest, model)


def test_kernels_that_round_are_bounded_too(bits: int, copied: Path, fixed_bundle: Path) -> None:
    manifest, model = read_manifest(copied), load_decoder(fixed_bundle)
    quantise_step(copied / "step.onnx", pack_weights(model, bits))
    round_activations(copied / "step.onnx")
    with pytest.raises(ParityError, match=r"limit is 0\.0001"):
        check_parity(copied, manifest, model)
    assert check_parity(copied, manifest, model, rounded=True).max_error > TOLERANCE
    with torch.no_grad():
        model.get_submodule("blocks.0.qkv").weight.mul_(1.5)
    with pytest.raises(ParityError, match="differ"):
        check_parity(copied, manifest, model, rounded=True)


@pytest.mark.usefixtures("ready_graphs")
def test_too_much_loss_is_refused(fixed_bundle: Path, heldout: Dataset, tmp_path: Path) -> None:
    with pytest.raises(LossError, match=r"int4 weights need .* the limit is 0\.001, so nothing"):
        export_bundle(
            checkpoint_of(fixed_bundle),
            tmp_path / "bundle",
            name="new",
            precision=Precision(4, heldout, max_loss=0.001),
        )
    assert list(tmp_path.iterdir()) == []


def test_limits_unless_others_are_given(heldout: Dataset) -> None:
    assert [Precision(bits, heldout).limit for bits in (8, 4)] == [0.02, 0.1]
    assert Precision(4, heldout, max_loss=0.0).limit == 0


def test_data_of_another_kind_is_refused(
    fixed_bundle: Path, full_bundle: Path, heldout: Dataset, tmp_path: Path
) -> None:
    info = load_checkpoint(checkpoint_of(full_bundle)).data
    other = Dataset(info, heldout.train, heldout.heldout)
    with pytest.raises(ValueError, match="has modality text, but the model was trained on im"):
        export_bundle(
            checkpoint_of(fixed_bundle), tmp_path / "b", name="new", precision=Precision(8, other)
        )


def test_a_stream_is_that_of_the_rounded_weights_alone_and_in_a_batch(quantised: Path) -> None:
    tokens = draw_tokens(quantised, 4)
    expected = expected_logits(quantised, tokens)
    limit = ROUNDED_TOLERANCE * float(np.abs(expected).max())
    together = Served(quantised)
    for _ in tokens:
        together.cache.begin()
    got = together.decode(tokens)
    assert_parity(got, expected, limit)
    for row in range(4):
        alone = Served(quantised, slots=1)
        alone.start_prefill()
        assert_parity(alone.prefill(tokens[row]), expected[row], limit)
        alone.cache.begin()
        assert np.abs(alone.decode(tokens[row : row + 1])[0] - got[row]).max() < limit / 4


def test_command(
    fixed_bundle: Path,
    heldout: Dataset,
    ready_graphs: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_dataset(tmp_path / "data", heldout)

    def run(*arguments: str) -> tuple[int, str]:
        paths = [str(checkpoint_of(fixed_bundle)), str(tmp_path / "bundle")]
        monkeypatch.setattr(sys, "argv", ["concertina", "export", *paths, *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        assert isinstance(exit.value.code, int)
        return exit.value.code, " ".join(capsys.readouterr().err.split())

    data = ("--data", str(tmp_path / "data"))
    code, err = run("--weights", "int8")
    assert code and "--data" in err
    code, err = run(*data)
    assert code and "--weights" in err
    code, err = run("--weights", "int4", "--max-loss", "0.0001", *data)
    assert code == 1 and "raise --max-loss" in err
    assert not (tmp_path / "bundle").exists()
    code, err = run("--weights", "int8", *data)
    assert code == 0 and "against float16, over 384 tokens" in err
    assert read_manifest(tmp_path / "bundle").quantisation.bits == 8
