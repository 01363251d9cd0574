"""Exports a checkpoint as a bundle: writes its graphs, checks them, and replaces the old bundle."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from concertina.bundle.manifest import MANIFEST, write_manifest
from concertina.codecs.chat_template import TEMPLATE
from concertina.codecs.tokenizer_file import TOKENIZER
from concertina.v1 import bundle_pb2 as pb
from export.cost import count_cost, folds_reset
from export.graph_file import LARGEST_GRAPH, lies_beside, stored
from export.graphs import (
    Units,
    export_fold,
    export_step,
    schedule_of,
    state_tensors,
)
from export.heldout import cache_units, heldout_bits, turning_pairs
from export.moves import export_moves
from export.packing import Packed
from export.parity import check_parity
from export.quantise import (
    BLOCK,
    PRETRAINED_BLOCK,
    pack_weights,
    quantise_step,
    round_activations,
)
from export.weights import round_weights
from export.windows import Windows, text_windows, windows_of
from model.config import ModelConfig
from model.data import END_OF_TEXT, Dataset, DatasetInfo
from model.decoder import Decoder
from model.run import Checkpoint, load_checkpoint

_LIMITS = {8: 0.02, 4: 0.1}
_STATE_LIMIT = 0.01
_MODALITY = {"text": pb.MODALITY_TEXT, "image": pb.MODALITY_IMAGE}


class LossError(Exception):
    """The quantised weights or caches predict held-out data worse than allowed."""


@dataclass(frozen=True)
class Precision:
    """How to quantise matrices, and the largest loss, in bits per held-out byte or pixel."""

    bits: int
    heldout: Dataset
    max_loss: float | None = None
    """None: 0.02 for 8 bits, 0.1 for 4."""

    @property
    def limit(self) -> float:
        """`max_loss`, or its default."""
        return _LIMITS[self.bits] if self.max_loss is None else self.max_loss


@dataclass(frozen=True)
class StatePrecision:
    """That caches are int8, by which data, and the largest loss; see Precision."""

    dataset: Dataset
    max_loss: float | None = None
    """None: 0.01."""

    @property
    def limit(self) -> float:
        """`max_loss`, or its default."""
        return _STATE_LIMIT if self.max_loss is None else self.max_loss


def export_bundle(
    checkpoint_folder: Path,
    bundle_folder: Path,
    *,
    name: str,
    version: str = "1",
    precision: Precision | None = None,
    state_precision: StatePrecision | None = None,
    data_type: pb.DataType = pb.DATA_TYPE_FLOAT32,
    largest_graph: int = LARGEST_GRAPH,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> pb.Manifest:
    """Export the newest checkpoint of `checkpoint_folder` as the bundle `bundle_folder`.

    precision: how to quantise matrices; None stores them as float16.
    state_precision: makes keys and values int8; `data_type` must be float32 then.
    data_type: type of stacks and histories. A GPU needs float16; such a bundle also has the graphs
    that move state inside the device.
    largest_graph: bytes of weights above which they are put beside the step graph.

    Raises ParityError if the parity check fails, LossError if the loss is above the limit,
    FileExistsError if `bundle_folder` exists and is not a bundle, and ValueError if the held-out
    data does not fit the model or its pattern has no caches that can be int8. After an error, no
    file is left over and an older bundle is unchanged.
    """
    if bundle_folder.exists() and not (bundle_folder / MANIFEST).exists():
        raise FileExistsError(
            f"{bundle_folder} exists and is not a bundle: choose another folder, or remove it"
        )
    checkpoint = load_checkpoint(checkpoint_folder)
    windows = None
    if precision is not None:
        windows = _windows(precision.heldout, checkpoint, checkpoint_folder)
    if state_precision is not None:
        assert data_type == pb.DATA_TYPE_FLOAT32
        state_tensors(checkpoint.model, pb.DATA_TYPE_INT8)
        windows = _windows(state_precision.dataset, checkpoint, checkpoint_folder)
    if checkpoint.origin is None:  # a pretrained model is served as it is
        round_weights(checkpoint.model)
    size, widest = stored(checkpoint.model)
    beside = size > largest_graph
    manifest = describe(checkpoint, name, version, data_type)
    if widest != pb.DATA_TYPE_FLOAT16:
        manifest.weights = widest
    bundle_folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{bundle_folder.name}.", dir=bundle_folder.parent))
    try:
        on_stage("exporting the step graph")
        export_step(checkpoint.model, partial / "step.onnx", data_type, beside=beside)
        files = ["step.onnx"]
        if manifest.HasField("fold"):
            on_stage("exporting the fold graph")
            export_fold(checkpoint.model, partial / "fold.onnx", data_type)
            files.append("fold.onnx")
        if data_type == pb.DATA_TYPE_FLOAT16:
            on_stage("exporting the graphs that move state")
            files += export_moves(manifest.state, partial)
        packed: Mapping[str, Packed] = {}
        if precision is not None and windows is not None:
            on_stage(f"measuring held-out bits with {weights_type(manifest)} weights")
            noted = manifest.quantisation
            noted.heldout_float16, _ = heldout_bits(partial, manifest, windows)
            noted.bits = precision.bits
            noted.block = BLOCK if checkpoint.origin is None else PRETRAINED_BLOCK
            packed = pack_weights(checkpoint.model, noted.bits, noted.block)
            quantise_step(partial / "step.onnx", packed)
        on_stage("checking parity with the trained model")
        manifest.parity.CopyFrom(check_parity(partial, manifest, checkpoint.model))
        if precision is not None and windows is not None:
            on_stage(f"measuring held-out bits with int{precision.bits} weights")
            round_activations(partial / "step.onnx")
            _weigh(partial, manifest, checkpoint.model, windows, precision.limit)
        if state_precision is not None and windows is not None:
            limit = state_precision.limit
            _round_caches(partial, manifest, checkpoint.model, packed, windows, limit, on_stage)
        for extra in (TOKENIZER, TEMPLATE):
            if checkpoint.origin is not None and (checkpoint_folder / extra).exists():
                shutil.copyfile(checkpoint_folder / extra, partial / extra)
                files.append(extra)
        write_manifest(partial, manifest, files)
        partial.chmod(0o755)
        if bundle_folder.exists():
            shutil.rmtree(bundle_folder)
        partial.rename(bundle_folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _windows(dataset: Dataset, checkpoint: Checkpoint, folder: Path) -> Windows:
    """What the model in `folder` is measured on. Raises ValueError if the data does not fit it."""
    if checkpoint.origin is not None:
        return text_windows(dataset, checkpoint.config, checkpoint.origin, folder)
    _check_fit(dataset.info, checkpoint.data)
    return windows_of(dataset, checkpoint.config.context)


def _check_fit(given: DatasetInfo, trained: DatasetInfo) -> None:
    for field in ("modality", "vocabulary", "labels"):
        here, there = getattr(given, field), getattr(trained, field)
        if here != there:
            raise ValueError(
                f"the data has {field} {here}, but the model was trained on {there}: "
                "use the data that the model was trained on"
            )


def weights_type(manifest: pb.Manifest) -> str:
    """Name of the type that the matrices have, or had before they were quantised."""
    kind = manifest.weights or pb.DATA_TYPE_FLOAT16
    return pb.DataType.Name(kind).removeprefix("DATA_TYPE_").lower()


def loss_unit(manifest: pb.Manifest) -> str:
    """What losses are for each of: tokens may be more than a byte."""
    return "pixel" if manifest.modality == pb.MODALITY_IMAGE else "byte"


def _weigh(
    folder: Path, manifest: pb.Manifest, model: Decoder, windows: Windows, limit: float
) -> None:
    """Record in `manifest` the loss of the quantised graphs. Raises LossError above the limit."""
    noted = manifest.quantisation
    noted.rounded_parity.CopyFrom(check_parity(folder, manifest, model, rounded=True))
    noted.heldout, noted.tokens = heldout_bits(folder, manifest, windows)
    _check_loss(
        manifest,
        (f"int{noted.bits} weights", noted.heldout),
        (f"{weights_type(manifest)} weights", noted.heldout_float16),
        limit,
        "use more bits",
    )


def _check_loss(
    manifest: pb.Manifest,
    rounded: tuple[str, float],
    exact: tuple[str, float],
    limit: float,
    remedy: str,
) -> None:
    """Raise LossError if what is `rounded`, with its held-out bits, loses too much."""
    loss = rounded[1] - exact[1]
    if not loss <= limit:
        raise LossError(
            f"{rounded[0]} need {rounded[1]:.4f} bits per held-out {loss_unit(manifest)}, "
            f"{exact[0]} {exact[1]:.4f}: {loss:.4f} more, and the limit is {limit:g}, so nothing "
            f"was written; {remedy}, or raise --max-loss"
        )


def narrow_caches(
    folder: Path,
    manifest: pb.Manifest,
    model: Decoder,
    units: Units,
    packed: Mapping[str, Packed],
) -> None:
    """Export the graphs in `folder` again, with caches in int8, and say so in `manifest`.

    packed: the quantised matrices of `model`, if it has any; until `round_activations`, their
    kernels use exact activations.
    """
    step = folder / "step.onnx"
    export_step(model, step, pb.DATA_TYPE_INT8, units, beside=lies_beside(step))
    if packed:
        quantise_step(step, packed)
    if manifest.HasField("fold"):
        export_fold(model, folder / "fold.onnx", pb.DATA_TYPE_INT8, units)
    del manifest.state[:]
    manifest.state.extend(state_tensors(model, pb.DATA_TYPE_INT8))


def _round_caches(
    folder: Path,
    manifest: pb.Manifest,
    model: Decoder,
    packed: Mapping[str, Packed],
    windows: Windows,
    limit: float,
    on_stage: Callable[[str], None],
) -> None:
    """Put graphs with int8 caches in place of those in `folder`, and their loss into `manifest`.

    Raises ParityError if they compute something else, and LossError above the limit.
    """
    noted = manifest.state_quantisation
    on_stage("measuring held-out bits with float32 caches")
    noted.heldout_float32, _ = heldout_bits(folder, manifest, windows)
    on_stage("exporting the graphs with int8 caches")
    units = cache_units(folder, manifest, windows.training, turning_pairs(model))
    narrow_caches(folder, manifest, model, units, packed)
    on_stage("checking parity with int8 caches")
    noted.parity.CopyFrom(check_parity(folder, manifest, model, units=units))
    on_stage("measuring held-out bits with int8 caches")
    if packed:
        round_activations(folder / "step.onnx")
    noted.heldout, noted.tokens = heldout_bits(folder, manifest, windows)
    _check_loss(
        manifest,
        ("int8 caches", noted.heldout),
        ("float32 caches", noted.heldout_float32),
        limit,
        "use --state float32",
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
        attention=_attention(config),
        cost=count_cost(checkpoint.model),
    )
    schedule = schedule_of(checkpoint.model)
    if schedule is not None:
        manifest.fold.span, manifest.fold.binary = schedule.span, schedule.binary
        manifest.fold.keep_first = schedule.keep_first
        manifest.fold.keep_newest = schedule.keep_newest
        manifest.fold.resets = folds_reset(checkpoint.model)
    if checkpoint.origin is not None:
        origin = checkpoint.origin
        manifest.tokenizer.template_tokens.update(origin.template_tokens)
        manifest.tokenizer.SetInParent()
        if origin.begin_token is not None:
            manifest.tokenizer.begin_token = origin.begin_token
        if origin.end_tokens:
            manifest.end_token = origin.end_tokens[0]
            manifest.tokenizer.end_tokens.extend(origin.end_tokens[1:])
    elif data.modality == "text":
        manifest.end_token = END_OF_TEXT
    else:
        manifest.image.width, manifest.image.height = data.image_width, data.image_height
        manifest.image.palette = bytes(channel for colour in data.palette for channel in colour)
    return manifest


def _attention(config: ModelConfig) -> str:
    """See `Manifest.attention`."""
    if config.architecture.folding is not None:
        return f"folded:{config.architecture.folding.summary}"
    return config.attention + (f":{config.pooling}" if config.pooling != "max" else "")
