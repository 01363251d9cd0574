"""Where the weights of a fine-tuned model come from: another run, or a bundle.

The graphs of a bundle carry the model's config, and which initializer holds each parameter;
`export.weights` writes that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from torch import Tensor

from model.config import ModelConfig
from model.data import DatasetInfo
from model.decoder import Decoder
from model.run import CHECKPOINT, CONFIG, RunError, load_checkpoint

HALF = ".half"
"""Ends the name of an initializer that is stored in two bytes a weight."""
CONFIG_PROP, WEIGHTS_PROP = "concertina.model_config", "concertina.weights"
"""Metadata of a graph: the config, and the initializer of each parameter."""
_STEP, _MANIFEST = "step.onnx", "manifest.json"


@dataclass(frozen=True)
class Initial:
    """Weights to begin with, and what is noted of them in the configuration of the run."""

    model: Decoder
    modality: str
    origin: dict[str, str | int]

    def __str__(self) -> str:
        if "bundle" in self.origin:
            return f"the weights of the bundle {self.origin['bundle']}, rounded to float16 there"
        return f"the weights of {self.origin['run']} after step {self.origin['step']:,}"


def read_initial(source: Path, model: ModelConfig, data: DatasetInfo) -> Initial:
    """The weights to begin with. Raises RunError if they do not fit `model`.

    Their pattern may be another one, as long as the weights have the same names and shapes.
    """
    if (source / _STEP).exists():
        found = _of_bundle(source)
    elif (source / CHECKPOINT).exists() and (source / CONFIG).exists():
        run = load_checkpoint(source)
        origin: dict[str, str | int] = {"run": str(source.resolve()), "step": run.step}
        found = Initial(run.model, run.data.modality, origin)
    else:
        raise RunError(
            f"{source} is neither a run nor a bundle: name a folder that `concertina train` or "
            "`concertina export` has written"
        )
    if found.modality != data.modality:
        raise RunError(f"{source} has a model of {found.modality}, but the data is {data.modality}")
    old, new = asdict(found.model.config), asdict(model)
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


def decoder_in(
    folder: Path, unpack: Callable[[onnx.ModelProto], Mapping[str, Tensor]]
) -> Decoder | None:
    """The decoder in the graphs of a bundle, with the weights that are served.

    unpack: gives the matrices of few bits of a graph, by the initializer that each stands for, in
    PyTorch's layout. None if Concertina did not export the graphs.
    """
    config, weights = None, {}
    for path in sorted(folder.glob("*.onnx")):
        proto = onnx.load(path)
        props = {prop.key: json.loads(prop.value) for prop in proto.metadata_props}
        if CONFIG_PROP not in props:
            continue
        config = ModelConfig.read(props[CONFIG_PROP])
        restore_float(proto)
        stored = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
        unpacked = unpack(proto)
        for name, (initializer, transposed) in props[WEIGHTS_PROP].items():
            if initializer in unpacked:
                weights[name] = unpacked[initializer]
            else:
                values = torch.tensor(stored[initializer])
                weights[name] = values.T if transposed else values
    if config is None:
        return None
    model = Decoder(config)
    model.load_state_dict(weights)
    return model.eval()


def restore_float(proto: onnx.ModelProto) -> None:
    """Widen what a graph stores in two bytes a weight; that is exact."""
    graph = proto.graph
    halves = {tensor.name: tensor for tensor in graph.initializer if tensor.name.endswith(HALF)}
    for tensor in halves.values():
        values = numpy_helper.to_array(tensor).astype("float32")
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name.removesuffix(HALF)))
    nodes = [node for node in graph.node if not (node.input and node.input[0] in halves)]
    del graph.node[:]
    graph.node.extend(nodes)


def _of_bundle(folder: Path) -> Initial:
    def refuse(proto: onnx.ModelProto) -> Mapping[str, Tensor]:
        if any(node.op_type == "MatMulNBits" for node in proto.graph.node):
            raise RunError(
                f"{folder} has matrices of few bits, which training cannot go on from: name the "
                "run that it was exported from, or its bundle of float16"
            )
        return {}

    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        modality = manifest["modality"].removeprefix("MODALITY_").lower()
        origin = {"bundle": str(folder.resolve()), "fingerprint": manifest["fingerprint"]}
        model = decoder_in(folder, refuse)
    except RunError:
        raise
    except OSError as error:
        raise RunError(f"the bundle {folder} cannot be read: {error}") from None
    except (AttributeError, DecodeError, KeyError, RuntimeError, ValueError) as error:
        raise RunError(f"the bundle {folder} is damaged ({error!r})"[:300]) from None
    if model is None:
        raise RunError(f"the graphs of {folder} are not of Concertina, so it gives no weights")
    return Initial(model, modality, origin)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "x".join(map(str, shape)) if shape is not None else "missing"
