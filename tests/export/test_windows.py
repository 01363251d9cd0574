"""What pretrained models are measured on: text as their tokenizers take it apart."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from concertina.bundle.manifest import read_manifest
from concertina.cli.main import main
from concertina.v1 import bundle_pb2 as pb
from export.bundle import Precision, StatePrecision, export_bundle
from export.quantise import PRETRAINED_BLOCK, pack_weights
from export.weights import load_decoder
from export.windows import Windows, text_windows
from model.data import Dataset, DatasetInfo, save_dataset
from model.pretrained.convert import convert
from model.run import load_checkpoint
from server.bundles.bundle import load_bundle
from server.runtime.onnx_session import Runtime
from tests.model.pretrained.folders import tensors, write
from tests.tokenizers_made import BYTE_LEVEL, content_of, trained

_LINES = ["the quick brown fox, wörld {n}\n" * 9, "Hello {n} there", "", "你好 {n}" * 40]
_DOCUMENTS = [line.format(n=n).encode() for n in range(40) for line in _LINES]
_BEGIN = 2


def text(documents: list[bytes], **info: int) -> Dataset:
    """A dataset of these documents."""
    tokens = np.frombuffer(b"".join(document + b"\0" for document in documents), np.uint8)
    return Dataset(
        DatasetInfo("text", info.get("vocabulary", 256), "us", "CC0-1.0"), tokens, tokens
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model whose embeddings are its head, with a tokenizer of pieces of text."""
    folder, size = tmp_path_factory.mktemp("pretrained"), trained(BYTE_LEVEL).get_vocab_size()
    weights = tensors()
    del weights["lm_head.weight"]
    generator = torch.Generator().manual_seed(1)
    weights["model.embed_tokens.weight"] = torch.randn(size, 16, generator=generator)
    source = write(folder / "hf", weights, vocab_size=size, tie_word_embeddings=True)
    (source / "tokenizer.json").write_bytes(content_of(BYTE_LEVEL))
    convert(source, folder / "run")
    return folder / "run"


def windows(run: Path, dataset: Dataset, begin: int | None = None) -> Windows:
    checkpoint = load_checkpoint(run)
    assert checkpoint.origin is not None
    origin = dataclasses.replace(checkpoint.origin, begin_token=begin)
    return text_windows(dataset, checkpoint.config, origin, run)


@pytest.mark.parametrize("begin", [None, _BEGIN])
def test_windows_are_streams_of_one_document(begin: int | None, run: Path) -> None:
    found, tokenizer = windows(run, text(_DOCUMENTS), begin), trained(BYTE_LEVEL)
    size, seen = 0, set()
    for inputs, targets in found.heldout:
        assert inputs.shape == targets.shape and 1 <= inputs.shape[1] <= 32
        assert np.array_equal(inputs[0, 1:], targets[0, :-1])
        said = tokenizer.decode(targets[0], skip_special_tokens=False).strip("\ufffd").encode()
        (whole, *_) = [document for document in _DOCUMENTS if said in document]
        seen.add(_DOCUMENTS.index(whole))
        size += sum(len(tokenizer.id_to_token(token)) for token in targets[0])  # a sign a byte
        if begin is not None:
            assert inputs[0, 0] == begin
    assert found.size == size
    assert len(found.heldout) > 20 and max(seen) - min(seen) > 100  # from everywhere
    assert all(row[0, 0] == begin for row in found.training if begin is not None)
    assert len(np.unique(found.training[-1])) > 20  # random tokens


def test_other_data_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is text with vocabulary 7: a pretrained model is meas"):
        windows(run, text(_DOCUMENTS, vocabulary=7))
    with pytest.raises(ValueError, match="the held-out data has no text"):
        windows(run, text([b"", b""]))
    checkpoint = load_checkpoint(run)
    assert checkpoint.origin is not None
    with pytest.raises(ValueError, match=r"has no tokenizer\.json, so its model cannot be meas"):
        text_windows(text(_DOCUMENTS), checkpoint.config, checkpoint.origin, tmp_path)


def bits_per_byte(model: torch.nn.Module, found: Windows) -> float:
    nats = 0.0
    for inputs, targets in found.heldout:
        with torch.no_grad():
            chances = model(torch.from_numpy(inputs)).log_softmax(-1)
        nats -= chances.gather(-1, torch.from_numpy(targets)[..., None]).sum().item()
    return float(nats / found.size / np.log(2))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_head_that_is_looked_up_in_is_stored_once(bits: int, run: Path, tmp_path: Path) -> None:
    data, model = text(_DOCUMENTS), load_checkpoint(run).model
    before, found = bits_per_byte(model, windows(run, data)), windows(run, data)
    export_bundle(run, tmp_path / "b", name="b", precision=Precision(bits, data, max_loss=1))
    manifest = read_manifest(tmp_path / "b")
    noted = manifest.quantisation
    assert (noted.bits, noted.block) == (bits, PRETRAINED_BLOCK)
    assert manifest.parity.max_error < 1e-5  # rows that are looked up, too
    assert noted.tokens == sum(targets.size for _, targets in found.heldout)
    pack_weights(model, bits, PRETRAINED_BLOCK)
    loaded = load_decoder(tmp_path / "b").state_dict()
    for name, expected in model.state_dict().items():
        assert torch.equal(loaded[name], expected), name
    assert noted.heldout_float16 == pytest.approx(before, abs=1e-5)
    assert noted.heldout == pytest.approx(bits_per_byte(model, found), abs=0.02)
    graph = onnx.load(tmp_path / "b" / "step.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert (kinds.count("MatMulNBits"), kinds.count("GatherBlockQuantized")) == (9, 1)
    large = [t.name for t in graph.initializer if len(t.dims) > 1 and t.dims[0] == len(expected)]
    assert sorted(name.split(".")[-1] for name in large) == ["half", "integers"]  # half: of scales
    Runtime(load_bundle(tmp_path / "b"), 2, threads=1)


def test_state_in_int8(run: Path, tmp_path: Path) -> None:
    data = text(_DOCUMENTS)
    state = StatePrecision(data, max_loss=0.1)
    precision = Precision(8, data, max_loss=1)
    folder = tmp_path / "b"
    export_bundle(run, folder, name="b", precision=precision, state_precision=state)
    manifest = read_manifest(folder)
    assert {tensor.data_type for tensor in manifest.state} == {pb.DATA_TYPE_INT8}
    noted = manifest.state_quantisation
    assert 0 < noted.parity.max_error < noted.parity.tolerance
    assert 0 < abs(noted.heldout - noted.heldout_float32) < 0.1
    assert noted.heldout_float32 == pytest.approx(manifest.quantisation.heldout)
    Runtime(load_bundle(folder), 2, threads=1)


def test_command(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_dataset(tmp_path / "data", text(_DOCUMENTS))
    paths = [str(run), str(tmp_path / "bundle"), "--data", str(tmp_path / "data")]
    command = ["concertina", "export", *paths, "--weights", "int8", "--max-loss", "9"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit:
        main()
    err = " ".join(capsys.readouterr().err.split())
    assert exit.value.code == 0
    assert "bits per held-out byte, " in err and "against float32, over" in err


def test_no_command_makes_a_bundle_that_nobody_can_serve(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A converted model whose source had no tokenizer."""
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    (bare / "tokenizer.json").unlink()
    monkeypatch.setattr(sys, "argv", ["concertina", "export", str(bare), str(tmp_path / "bundle")])
    with pytest.raises(SystemExit) as exit:
        main()
    err = " ".join(capsys.readouterr().err.split())
    assert exit.value.code == 1
    assert f"{bare} has no tokenizer.json, and without it no bundle can be served: save" in err
    assert "with transformers' save_pretrained, and convert the model again" in err
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]
