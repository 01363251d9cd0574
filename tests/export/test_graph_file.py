"""Weights beside a graph: they are the same, they are verified, and nothing else is read."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import json_format

from concertina.bundle.manifest import (
    MANIFEST,
    ManifestError,
    fingerprint,
    read_manifest,
    write_manifest,
)
from concertina.v1 import bundle_pb2 as pb
from export.bundle import export_bundle
from export.graph_file import DATA, lies_beside, read_graph
from export.quantise import pack_weights, quantise_step, round_activations
from export.streaming import Array, Graphs, prefill
from export.weights import load_decoder
from model.run import load_checkpoint
from server.bundles.bundle import BundleError, load_bundle
from server.runtime.onnx_session import Runtime
from tests.checkpoints import checkpoint_of, export_tiny
from tests.export.test_manifest import flip
from tests.once import one_at_a_time

STEP = "step.onnx"
DATA_FILE = STEP + DATA


@pytest.fixture(scope="module")
def inside(tiny_bundles: Path) -> Path:
    """The bundle of a model, with its weights in the graphs."""
    return export_tiny(tiny_bundles, "fixed")


@pytest.fixture(scope="module")
def beside(inside: Path) -> Path:
    """The same model with the weights of its step graph beside it."""
    folder = inside.with_name("weights-beside")
    with one_at_a_time(folder):
        if not folder.exists():
            manifest = read_manifest(inside)
            export_bundle(checkpoint_of(inside), folder, name=manifest.name, largest_graph=0)
    return folder


@pytest.fixture
def damaged(beside: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(beside, tmp_path / "damaged"))


def logits(folder: Path) -> Array:
    """Of one stream, over folds."""
    manifest = read_manifest(folder)
    graphs = Graphs(folder, manifest)
    tokens = np.random.default_rng(1).integers(manifest.vocabulary, size=(1, 24))
    return np.concatenate(list(prefill(graphs, graphs.start(1), tokens, 5, None)))


def test_it_is_the_same_model(inside: Path, beside: Path) -> None:
    old, new = read_manifest(inside), read_manifest(beside)
    assert [file.path for file in new.files] == [STEP, "fold.onnx", DATA_FILE]
    assert new.parity == old.parity
    assert np.array_equal(logits(beside), logits(inside))
    weights = load_decoder(inside).state_dict()
    for name, weight in load_decoder(beside).state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_large_matrices_leave_the_graph(inside: Path, beside: Path) -> None:
    for tensor in read_graph(beside / STEP).graph.initializer:
        assert len(tensor.raw_data) < 512 or len(tensor.dims) < 2
    places = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in read_graph(beside / STEP).graph.initializer
        if tensor.external_data
    ]
    assert places and {place["location"] for place in places} == {DATA_FILE}
    assert all(int(place["offset"]) % 4096 == 0 for place in places)  # it can be mapped
    sizes = [(folder / STEP).stat().st_size for folder in (beside, inside)]
    assert sizes[1] - sizes[0] > sum(int(place["length"]) for place in places) - 4096


def test_a_server_runs_it(beside: Path) -> None:
    Runtime(load_bundle(beside), 3, threads=1)


def test_quantised_matrices_lie_there_too(beside: Path, damaged: Path) -> None:
    model = load_checkpoint(checkpoint_of(beside.with_name("fixed"))).model
    plain = logits(damaged)
    quantise_step(damaged / STEP, pack_weights(model, 8))
    round_activations(damaged / STEP)
    assert lies_beside(damaged / STEP)
    ends = {}
    for tensor in read_graph(damaged / STEP).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            ends[tensor.name] = int(place["offset"]) + int(place["length"])
    assert any(name.endswith(".integers") for name in ends)
    assert (damaged / DATA_FILE).stat().st_size == max(ends.values())  # no old matrix is left
    write_manifest(damaged, read_unverified(damaged), [STEP, "fold.onnx"])
    np.testing.assert_allclose(logits(damaged), plain, rtol=0, atol=0.1 * np.abs(plain).max())


def read_unverified(folder: Path) -> pb.Manifest:
    """The manifest of a bundle whose files do not match it."""
    return json_format.Parse((folder / MANIFEST).read_text(), pb.Manifest())


def test_a_changed_number_is_seen(damaged: Path) -> None:
    flip(damaged / DATA_FILE, (damaged / DATA_FILE).stat().st_size // 2)
    with pytest.raises(BundleError, match=f"{damaged / DATA_FILE} does not match its checksum"):
        load_bundle(damaged)


def test_a_file_cut_short_is_seen(damaged: Path) -> None:
    content = (damaged / DATA_FILE).read_bytes()
    (damaged / DATA_FILE).write_bytes(content[:-1])
    with pytest.raises(BundleError, match=f"{damaged / DATA_FILE} has .* bytes, the manifest says"):
        load_bundle(damaged)


def test_a_missing_file_is_named(damaged: Path) -> None:
    (damaged / DATA_FILE).unlink()
    with pytest.raises(BundleError, match=f"{damaged / DATA_FILE} cannot be read: No such file"):
        load_bundle(damaged)


@pytest.mark.parametrize("location", ["../secret", "sub/secret", "./secret", "secret"])
@pytest.mark.parametrize("listed", [False, True])
def test_no_other_file_is_read(location: str, listed: bool, damaged: Path) -> None:
    """Though the checksum of the graph is right. What is listed is verified, so it may be read."""
    (damaged / "sub").mkdir()
    (damaged / location).write_bytes((damaged / DATA_FILE).read_bytes())
    location = location if location != "secret" else str(damaged / "secret")
    move(damaged / STEP, location)
    manifest = read_unverified(damaged)
    write_manifest(damaged, manifest, [STEP, "fold.onnx"])
    if not listed:
        forget(damaged, manifest, location)
    with pytest.raises(ManifestError, match="not a plain file" if listed else "no file that"):
        read_manifest(damaged)


def test_a_file_off_the_list_is_not_read(damaged: Path) -> None:
    forget(damaged, read_manifest(damaged), DATA_FILE)
    with pytest.raises(ManifestError, match=f"keeps weights in '{DATA_FILE}', which is no file"):
        read_manifest(damaged)


def move(graph: Path, location: str) -> None:
    """Say in a graph that its weights are elsewhere."""
    proto = read_graph(graph)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    graph.write_bytes(proto.SerializeToString())


def forget(folder: Path, manifest: pb.Manifest, name: str) -> None:
    """Take a file off the list of a bundle, with a fingerprint that is right."""
    kept = [file for file in manifest.files if file.path != name]
    assert len(kept) < len(manifest.files)
    del manifest.files[:]
    manifest.files.extend(kept)
    manifest.fingerprint = fingerprint(manifest)
    (folder / MANIFEST).write_text(
        json_format.MessageToJson(manifest, preserving_proto_field_name=True)
    )


def test_checksums_take_no_memory(tmp_path: Path) -> None:
    """256 MiB of zeros, which take no room on disk either."""
    proto = onnx.ModelProto()
    tensor = proto.graph.initializer.add(name="w", data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="w.data")
    (tmp_path / STEP).write_bytes(proto.SerializeToString())
    with (tmp_path / "w.data").open("wb") as file:
        file.truncate(1 << 28)
    tracemalloc.start()
    try:
        write_manifest(tmp_path, pb.Manifest(), [STEP])
        manifest = read_manifest(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [file.path for file in manifest.files] == [STEP, "w.data"]
    assert peak < 1 << 23
