"""Exports a checkpoint as a bundle: writes its graphs, checks them, and replaces the old bundle."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from concertina.bundle.manifest import MANIFEST, write_manifest
from concertina.v1 import bundle_pb2 as pb
from export.cost import count_cost
from export.graphs import export_fold, export_step, fold_resets, layers, state_tensors
from export.heldout import heldout_bits
from export.moves import export_moves
from export.parity import check_parity
from export.quantise import BLOCK, pack_weights, quantise_step, round_activations
from export.weights import round_weights, stored_bytes
from model.data import END_OF_TEXT, Dataset, DatasetInfo
from model.decoder import Decoder
from model.run import Checkpoint, load_checkpoint

TOKENIZER = "tokenizer.json"
"""What the tokens of a pretrained model are; its bundle holds it as it was found."""

LARGEST_GRAPH = (1 << 31) - (1 << 24)
"""Bytes of weights in one file of ONNX, which is a protobuf message, beside its nodes."""

_LIMITS = {8: 0.02, 4: 0.1}
_MODALITY = {"text": pb.MODALITY_TEXT, "image": pb.MODALITY_IMAGE}


class LossError(Exception):
    """The quantised weights predict held-out data worse than allowed."""


@dataclass(frozen=True)
class Precision:
    """How to quantise matrices, and the largest loss, in bits per held-out token."""

    bits: int
    heldout: Dataset
    max_loss: float | None = None
    """None: 0.02 for 8 bits, 0.1 for 4."""

    @property
    def limit(self) -> float:
        """`max_loss`, or its default."""
        return _LIMITS[self.bits] if self.max_loss is None else self.max_loss


def export_bundle(
    checkpoint_folder: Path,
    bundle_folder: Path,
    *,
    name: str,
    version: str = "1",
    precision: Precision | None = None,
    data_type: pb.DataType = pb.DATA_TYPE_FLOAT32,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> pb.Manifest:
    """Export the newest checkpoint of `checkpoint_folder` as the bundle `bundle_folder`.

    precision: how to quantise matrices; None stores them as float16.
    data_type: type of stacks and histories. A GPU needs float16; such a bundle also has the graphs
    that move state inside the device.

    Raises ParityError if the parity check fails, LossError if the loss is above the limit,
    FileExistsError if `bundle_folder` exists and is not a bundle, and ValueError if the held-out
    data does not fit the model. After an error, no file is left over and an older bundle is
    unchanged.
    """
    if bundle_folder.exists() and not (bundle_folder / MANIFEST).exists():
        raise FileExistsError(
            f"{bundle_folder} exists and is not a bundle: choose another folder, or remove it"
        )
    checkpoint = load_checkpoint(checkpoint_folder)
    if precision is not None:
        _check_fit(precision.heldout.info, checkpoint.data)
    if checkpoint.origin is None:  # a pretrained model is served as it is
        round_weights(checkpoint.model)
    if (size := stored_bytes(checkpoint.model)) > LARGEST_GRAPH:
        raise ValueError(
            f"the weights take {size:,} bytes, and a graph holds at most {LARGEST_GRAPH:,}: this "
            "model is too large for a bundle"
        )
    manifest = describe(checkpoint, name, version, data_type)
    bundle_folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{bundle_folder.name}.", dir=bundle_folder.parent))
    try:
        on_stage("exporting the step graph")
        export_step(checkpoint.model, partial / "step.onnx", data_type)
        files = ["step.onnx"]
        if manifest.HasField("fold"):
            on_stage("exporting the fold graph")
            export_fold(checkpoint.model, partial / "fold.onnx", data_type)
            files.append("fold.onnx")
        if data_type == pb.DATA_TYPE_FLOAT16:
            on_stage("exporting the graphs that move state")
            files += export_moves(manifest.state, partial)
        if precision is not None:
            on_stage("measuring held-out bits with float16 weights")
            manifest.quantisation.heldout_float16, _ = heldout_bits(
                partial, manifest, precision.heldout
            )
            quantise_step(partial / "step.onnx", pack_weights(checkpoint.model, precision.bits))
        on_stage("checking parity with the trained model")
        manifest.parity.CopyFrom(check_parity(partial, manifest, checkpoint.model))
        if precision is not None:
            on_stage(f"measuring held-out bits with int{precision.bits} weights")
            round_activations(partial / "step.onnx")
            _weigh(partial, manifest, checkpoint.model, precision)
        if checkpoint.origin is not None and (checkpoint_folder / TOKENIZER).exists():
            shutil.copyfile(checkpoint_folder / TOKENIZER, partial / TOKENIZER)
            files.append(TOKENIZER)
        write_manifest(partial, manifest, files)
        partial.chmod(0o755)
        if bundle_folder.exists():
            shutil.rmtree(bundle_folder)
        partial.rename(bundle_folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _check_fit(given: DatasetInfo, trained: DatasetInfo) -> None:
    for field in ("modality", "vocabulary", "labels"):
        here, there = getattr(given, field), getattr(trained, field)
        if here != there:
            raise ValueError(
                f"the data has {field} {here}, but the model was trained on {there}: "
                "use the data that the model was trained on"
            )


def _weigh(folder: Path, manifest: pb.Manifest, model: Decoder, precision: Precision) -> None:
    """Record in `manifest` the loss of the quantised graphs. Raises LossError above the limit."""
    noted = manifest.quantisation
    noted.bits, noted.block = precision.bits, BLOCK
    noted.rounded_parity.CopyFrom(check_parity(folder, manifest, model, rounded=True))
    noted.heldout, noted.tokens = heldout_bits(folder, manifest, precision.heldout)
    loss, limit = noted.heldout - noted.heldout_float16, precision.limit
    if not loss <= limit:
        raise LossError(
            f"int{precision.bits} weights need {noted.heldout:.4f} bits per held-out token, "
            f"float16 weights {noted.heldout_float16:.4f}: {loss:.4f} more, and the limit is "
            f"{limit:g}, so nothing was written; use more bits, or raise --max-loss"
        )


def describe(
    checkpoint: Checkpoint,
    name: str,
    version: str,
    data_type: pb.DataType = pb.DATA_TYPE_FLOAT32,
) -> pb.Manifest:
    """The manifest of `checkpoint`, without files, parity and fingerprint."""
    config, data = checkpoint.config, checkpoint.data
    metrics = dict(checkpoint.metrics)
    manifest = pb.Manifest(
        name=name,
        version=version,
        modality=_MODALITY[data.modality],
        vocabulary=config.vocabulary,
        labels=data.labels,
        context=config.context,
        state=state_tensors(checkpoint.model, data_type),
        training_data=pb.TrainingData(
            source=data.source, license=data.license, tokens=int(metrics.pop("tokens"))
        ),
        metrics=metrics,
        parameters=sum(p.numel() for p in checkpoint.model.parameters()),
        attention=config.attention + (f":{config.pooling}" if config.pooling != "max" else ""),
        cost=count_cost(checkpoint.model),
    )
    schedule = layers(checkpoint.model)[0].schedule
    if schedule is not None:
        manifest.fold.span, manifest.fold.binary = schedule.span, schedule.binary
        manifest.fold.resets = fold_resets(checkpoint.model)
    if checkpoint.origin is not None:
        origin = checkpoint.origin
        manifest.tokenizer.SetInParent()
        if origin.end_tokens:
            manifest.end_token = origin.end_tokens[0]
            manifest.tokenizer.end_tokens.extend(origin.end_tokens[1:])
    elif data.modality == "text":
        manifest.end_token = END_OF_TEXT
    else:
        manifest.image.width, manifest.image.height = data.image_width, data.image_height
        manifest.image.palette = bytes(channel for colour in data.palette for channel in colour)
    return manifest
