"""Bundles for measuring alone, with random weights or of a run: their parity is not checked."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch

from concertina.bundle.manifest import write_manifest
from concertina.codecs.tokenizer_file import TOKENIZER
from concertina.v1 import bundle_pb2 as pb
from export.bundle import describe
from export.graph_file import LARGEST_GRAPH, stored
from export.graphs import Units, export_fold, export_step, layers, state_tensors
from export.heldout import cache_units
from export.moves import export_moves
from export.quantise import BLOCK, pack_weights, quantise_step, round_activations
from export.weights import round_weights
from loadtest.bench.plan import Shape
from model.config import ModelConfig
from model.decoder import Decoder
from model.run import CHECKPOINT, CONFIG, Checkpoint, load_checkpoint

_SEED = 0
_DATA_TYPES = {
    "float32": pb.DATA_TYPE_FLOAT32,
    "float16": pb.DATA_TYPE_FLOAT16,
    "int8": pb.DATA_TYPE_INT8,
}


def make_bundle(
    folder: Path,
    shape: Shape,
    context: int,
    span: int | None,
    weights: str = "float32",
    state: str = "float32",
) -> None:
    """Write a byte model for `context` tokens to `folder`: full attention when `span` is None.

    weights: float32 (stored as float16, computed in float32), int8 or int4. state: float32,
    float16 or int8. Positions are sinusoids, so that no table grows with the context. Raises
    FileExistsError when `folder` is there.
    """
    folder.mkdir(parents=True)
    # What the step graph computes does not depend on the context, which only sizes its stacks: it
    # is exported for a short one, since the exporter allocates them.
    short = _decoder(shape, span or 8, span)
    model = _decoder(shape, context, span)
    bits = 0 if weights == "float32" else int(weights.removeprefix("int"))
    packed = pack_weights(short, bits) if bits else {}
    data_type, units = _DATA_TYPES[state], None
    if data_type == pb.DATA_TYPE_INT8:
        _export(folder, short, pb.DATA_TYPE_FLOAT32)
        units = _units(folder, shape, span)
    files = _export(folder, short, data_type, units)
    manifest = pb.Manifest(
        name="bench",
        version="random",
        modality=pb.MODALITY_TEXT,
        vocabulary=shape.vocabulary,
        context=context,
        state=state_tensors(model, data_type),
        parameters=sum(p.numel() for p in model.parameters()),
        attention=model.config.attention,
    )
    schedule = layers(model)[0].schedule
    if schedule is not None:
        manifest.fold.span = schedule.span
    if data_type == pb.DATA_TYPE_FLOAT16:
        files += export_moves(manifest.state, folder)
    if bits:
        manifest.quantisation.bits, manifest.quantisation.block = bits, BLOCK
        quantise_step(folder / "step.onnx", packed)
        round_activations(folder / "step.onnx")
    write_manifest(folder, manifest, files)


def make_bundle_of(run: Path, folder: Path, context: int, state: str = "float32") -> None:
    """Write the model of a run to `folder`, for `context` tokens where it can do with fewer.

    state: float32 or float16. Weights are stored as `concertina export` stores them, and computed
    in float32. Raises FileExistsError when `folder` is there.
    """
    folder.mkdir(parents=True)
    checkpoint = _shortened(run, context)
    data_type = _DATA_TYPES[state]
    if checkpoint.origin is None:
        round_weights(checkpoint.model)
    manifest = describe(checkpoint, "bench", "pretrained", data_type)
    files = ["step.onnx"]
    beside = stored(checkpoint.model).bytes > LARGEST_GRAPH
    export_step(checkpoint.model, folder / "step.onnx", data_type, beside=beside)
    if manifest.HasField("fold"):
        export_fold(checkpoint.model, folder / "fold.onnx", data_type)
        files.append("fold.onnx")
    if data_type == pb.DATA_TYPE_FLOAT16:
        files += export_moves(manifest.state, folder)
    if checkpoint.origin is not None and (run / TOKENIZER).exists():
        shutil.copyfile(run / TOKENIZER, folder / TOKENIZER)
        files.append(TOKENIZER)
    write_manifest(folder, manifest, files)


def _shortened(run: Path, context: int) -> Checkpoint:
    """The checkpoint of a run, for so many tokens, unless a table of positions has its length."""
    settings = json.loads((run / CONFIG).read_text())
    if settings["model"]["positions"] in ("none", "sinusoid"):
        settings["model"]["context"] = min(context, settings["model"]["context"])
    with tempfile.TemporaryDirectory() as shorter:
        (Path(shorter) / CONFIG).write_text(json.dumps(settings))
        (Path(shorter) / CHECKPOINT).symlink_to((run / CHECKPOINT).resolve())
        return load_checkpoint(Path(shorter))


def _export(
    folder: Path, model: Decoder, data_type: pb.DataType, units: Units | None = None
) -> list[str]:
    """Write the graphs of `model` to `folder`; returns their names."""
    files = ["step.onnx"]
    with torch.no_grad():
        export_step(model, folder / "step.onnx", data_type, units)
        _free_entries(folder / "step.onnx")
        if layers(model)[0].schedule is not None:
            export_fold(model, folder / "fold.onnx", data_type, units)
            files.append("fold.onnx")
    return files


def _units(folder: Path, shape: Shape, span: int | None) -> Units:
    """What 1 means in the caches of the float32 graphs in `folder`, after a few random tokens."""
    tokens = 2 * (span or 8)
    model = _decoder(shape, tokens, span)
    manifest = pb.Manifest(vocabulary=shape.vocabulary, state=state_tensors(model))
    if span is not None:
        manifest.fold.span = span
    return cache_units(
        folder,
        manifest,
        [np.random.default_rng(_SEED).integers(shape.vocabulary, size=(1, tokens))],
    )


def _decoder(shape: Shape, context: int, span: int | None) -> Decoder:
    torch.manual_seed(_SEED)
    model = Decoder(
        ModelConfig(
            vocabulary=shape.vocabulary,
            context=context,
            width=shape.width,
            layers=shape.layers,
            heads=shape.heads,
            mlp=shape.mlp,
            span=span or 2,
            attention="full" if span is None else "fixed",
            positions="sinusoid",
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:  # a fresh decoder has layers of zeros, which change nothing
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    round_weights(model)
    return model


def _free_entries(path: Path) -> None:
    """Let the stacks of a step graph have any number of entries."""
    proto = onnx.load(path)
    for value in [*proto.graph.input, *proto.graph.output]:
        if value.name.removeprefix("next.").startswith(("keys.", "values.")):
            value.type.tensor_type.shape.dim[2].dim_param = "entries"
    del proto.graph.value_info[:]
    onnx.save(proto, path)
