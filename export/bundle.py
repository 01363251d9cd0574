"""A checkpoint becomes a bundle: exported, checked, described, and moved into place in one go."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from concertina.manifest import MANIFEST, write_manifest
from concertina.v1 import bundle_pb2 as pb
from export.cost import count_cost
from export.graphs import export_fold, export_step, fold_resets, layers, state_tensors
from export.parity import check_parity
from export.weights import round_weights
from model.data import END_OF_TEXT
from model.train import Checkpoint, load_checkpoint

_MODALITY = {"text": pb.MODALITY_TEXT, "image": pb.MODALITY_IMAGE}


def export_bundle(
    checkpoint_folder: Path,
    bundle_folder: Path,
    *,
    name: str,
    version: str = "1",
    on_stage: Callable[[str], None] = lambda stage: None,
) -> pb.Manifest:
    """Export the newest checkpoint of `checkpoint_folder` as the bundle `bundle_folder`.

    Nothing is left behind, and an older bundle stays as it is, when the parity check fails (raises
    ParityError) or anything else does. Raises FileExistsError when what lies at `bundle_folder` is
    no bundle.
    """
    if bundle_folder.exists() and not (bundle_folder / MANIFEST).exists():
        raise FileExistsError(
            f"{bundle_folder} exists and is not a bundle, so it is not replaced: "
            "name another folder, or remove it yourself"
        )
    checkpoint = load_checkpoint(checkpoint_folder)
    round_weights(checkpoint.model)
    manifest = describe(checkpoint, name, version)
    bundle_folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{bundle_folder.name}.", dir=bundle_folder.parent))
    try:
        on_stage("exporting the step graph")
        export_step(checkpoint.model, partial / "step.onnx")
        files = ["step.onnx"]
        if manifest.HasField("fold"):
            on_stage("exporting the fold graph")
            export_fold(checkpoint.model, partial / "fold.onnx")
            files.append("fold.onnx")
        on_stage("checking parity with the trained model")
        manifest.parity.CopyFrom(check_parity(partial, manifest, checkpoint.model))
        write_manifest(partial, manifest, files)
        partial.chmod(0o755)
        if bundle_folder.exists():
            shutil.rmtree(bundle_folder)
        partial.rename(bundle_folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def describe(checkpoint: Checkpoint, name: str, version: str) -> pb.Manifest:
    """The manifest of `checkpoint`, still without files, parity and fingerprint."""
    config, data = checkpoint.config, checkpoint.data
    metrics = dict(checkpoint.metrics)
    manifest = pb.Manifest(
        name=name,
        version=version,
        modality=_MODALITY[data.modality],
        vocabulary=config.vocabulary,
        labels=data.labels,
        context=config.context,
        state=state_tensors(checkpoint.model),
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
    if data.modality == "text":
        manifest.end_token = END_OF_TEXT
    else:
        manifest.image.width, manifest.image.height = data.image_width, data.image_height
        manifest.image.palette = bytes(channel for colour in data.palette for channel in colour)
    return manifest
