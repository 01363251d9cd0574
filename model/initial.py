"""Where the weights of a fine-tuned model come from: another run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from model.config import ModelConfig
from model.data import DatasetInfo
from model.decoder import Decoder
from model.run import CHECKPOINT, CONFIG, Checkpoint, RunError, load_checkpoint


def read_initial(source: Path, model: ModelConfig, data: DatasetInfo) -> Checkpoint:
    """The run to begin with. Raises RunError if its weights do not fit `model`.

    Its pattern may be another one, as long as the weights have the same names and shapes.
    """
    if (source / "step.onnx").exists():
        raise RunError(
            f"{source} is a bundle: its weights are rounded, and laid out for decoding, so a model "
            "cannot be trained on from there; name the folder of the run that it was exported from"
        )
    if not (source / CHECKPOINT).exists() or not (source / CONFIG).exists():
        raise RunError(f"{source} is not a run: name a folder that `concertina train` has written")
    found = load_checkpoint(source)
    if found.data.modality != data.modality:
        raise RunError(
            f"{source} has a model of {found.data.modality}, but the data is {data.modality}"
        )
    old, new = asdict(found.config), asdict(model)
    there = {name: tuple(weight.shape) for name, weight in found.model.state_dict().items()}
    here = {name: tuple(weight.shape) for name, weight in Decoder(model).state_dict().items()}
    if here == there:
        return found
    fields = [
        f"{name} is {new[name]!r}, there {old[name]!r}" for name in new if new[name] != old[name]
    ]
    shapes = [
        f"{name} is {_shape(here.get(name))}, there {_shape(there.get(name))}"
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name)
    ]
    more = f", and {len(shapes) - 4} more" if len(shapes) > 4 else ""
    raise RunError(
        f"the weights of {source} do not fit: {'; '.join(fields)} "
        f"(so {'; '.join(shapes[:4])}{more}). Give the settings that it has, or no --init"
    )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "x".join(map(str, shape)) if shape is not None else "missing"
