"""Checkpoints as training leaves them, and bundles of them, whose random weights hide no mistake.

A fresh decoder adds nothing to its residual stream, so whatever attention does would go unseen.
Here every token of the past moves the logits, and half of the query channels are negative
throughout most blocks: a query maximum that starts at zero is seen, too.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from concertina.bundle.manifest import read_manifest, write_manifest
from concertina.v1 import bundle_pb2 as pb
from export.bundle import export_bundle, narrow_caches
from export.comparison.compare import Variant
from export.graphs import Units, state_tensors
from export.heldout import cache_units, turning_pairs
from export.quantise import BLOCK, pack_weights, quantise_step, round_activations
from export.weights import load_decoder
from model.config import ModelConfig
from model.data import DatasetInfo
from model.decoder import Block, Decoder
from model.layers.architecture import Architecture, Folding, Rope
from model.run import CHECKPOINT, CONFIG, TrainConfig
from tests.once import one_at_a_time

_SHARP = 1.5  # standard deviation of queries and keys, so that attention prefers some tokens


def random_decoder(config: ModelConfig, seed: int = 7) -> Decoder:
    """A decoder in which every weight matters; the same one for the same `config` and `seed`."""
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.add_(0.3 * noise)
            elif name.startswith(("embed", "positions")):
                weight.copy_(noise)
            else:
                weight.copy_(_SHARP * noise * weight.shape[1] ** -0.5)
        for block in model.blocks:
            assert isinstance(block, Block)
            if config.architecture.norm == "rms":
                continue
            bias, queries = block.norm_attention.bias, block.qkv.weight[: block.sizes[0] : 2]
            queries -= 4 * bias / (bias @ bias)  # adds -4 to every other channel of q
    return model


def write_checkpoint(folder: Path, config: ModelConfig, info: DatasetInfo) -> Path:
    """The folder that training `config` on `info` would leave, with random weights; `folder`."""
    model = random_decoder(config)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    settings = {"model": config.stored(), "train": asdict(TrainConfig()), "data": asdict(info)}
    metrics = {info.unit: 8.0, "tokens": 1.0}
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(settings))
    save_file(weights, folder / CHECKPOINT, {"step": "1", "metrics": json.dumps(metrics)})
    return folder


FOLDED = {
    "folded:max": Folding(("full", "window", "fold"), 1, 0, "max"),
    "folded:tangent": Folding(("fold", "full", "window"), 1, 1, "tangent"),
    "folded:fitted": Folding(("full", "fold", "window"), 0, 1, "fitted"),
}
"""Patterns of bundles whose layers attend in several ways, as the manifest writes them."""


def folded_config(folding: Folding, context: int = 32, span: int = 8) -> ModelConfig:
    """A small model of another's: its keys turn with their positions, and its heads share them."""
    return ModelConfig(
        7,
        context=context,
        width=16,
        layers=len(folding.layers),
        heads=4,
        mlp=24,
        span=span,
        attention="full",
        positions="none",
        architecture=Architecture(
            kv_heads=2,
            head_dim=8,
            norm="rms",
            activation="silu",
            gated=True,
            biases=(),
            rope=Rope((1.0, 0.3, 0.1, 0.03)),
            folding=folding,
        ),
    )


def checkpoint_of(bundle: Path) -> Path:
    """The checkpoint beside a bundle that `export_tiny` made."""
    return bundle.with_name(f"{bundle.name}-checkpoint")


def export_tiny(
    root: Path, pattern: str, context: int = 32, span: int = 8, half: bool = False
) -> Path:
    """Folder of a bundle below `root`, exported unless it is there; `<name>-checkpoint` beside it.

    `pattern` is written as in the manifest. `full` comes as text, the others as 8x4 pixels with two
    labels; longer contexts as text, too. `half` keeps its caches in float16, as a GPU does.
    """
    name = pattern.replace(":", "-") + (f"-{context}" if context != 32 else "") + "-half" * half
    with one_at_a_time(root / name):
        if not (root / name).exists():
            _export(root, name, pattern, context, span, half)
    return root / name


def _export(root: Path, name: str, pattern: str, context: int, span: int, half: bool) -> None:
    pixels = DatasetInfo(
        "image", 7, "noise", "CC0-1.0", 8, 4, tuple((40 * k, 9, 7) for k in range(7)), ("a", "b")
    )
    text = DatasetInfo("text", 7, "noise", "CC0-1.0")
    info = text if pattern in ("full", *FOLDED) or context != 32 else pixels
    if pattern in FOLDED:
        config = folded_config(FOLDED[pattern], context, span)
    else:
        variant = Variant.parse(pattern)
        config = ModelConfig(
            info.vocabulary,
            context=context,
            width=16,
            layers=2,
            heads=2,
            mlp=24,
            span=span,
            attention=variant.attention,
            pooling=variant.pooling,
            starts=info.starts,
        )
    checkpoint = write_checkpoint(root / f"{name}-checkpoint", config, info)
    data_type = pb.DATA_TYPE_FLOAT16 if half else pb.DATA_TYPE_FLOAT32
    export_bundle(checkpoint, root / name, name=f"tiny-{name}", version="7", data_type=data_type)


def quantise_tiny(bundle: Path, bits: int) -> Path:
    """A bundle beside `bundle`, the same but with matrices of `bits` bits, made unless it is there.

    Unlike `export_bundle`, this measures no loss.
    """
    folder = bundle.with_name(f"{bundle.name}-int{bits}")
    with one_at_a_time(folder):
        if not folder.exists():
            partial = bundle.with_name(f"{folder.name}-partial")
            shutil.copytree(bundle, partial, dirs_exist_ok=True)
            step, manifest = partial / "step.onnx", read_manifest(partial)
            quantise_step(step, pack_weights(load_decoder(bundle), bits))
            round_activations(step)
            manifest.quantisation.bits, manifest.quantisation.block = bits, BLOCK
            files = [file.path for file in manifest.files]
            del manifest.files[:]
            write_manifest(partial, manifest, files)
            partial.rename(folder)
    return folder


NARROWED = (
    "fixed",
    "fixed:mean",
    "fixed:deepset-max",
    "full",
    "logsparse-hierarchical",
    "sparse-fixed",
    *FOLDED,
)
"""Patterns whose caches can be int8."""


def in_few_bits(bundle: Path, kind: str) -> Path:
    """A bundle beside `bundle`, of a `kind`: `int8`, `int4`, `state8`, `int8-state8`."""
    bits = {"int8": 8, "int4": 4}.get(kind.removesuffix("state8").removesuffix("-"))
    if kind.endswith("state8"):
        return narrow_tiny(bundle, bits)
    return quantise_tiny(bundle, bits) if bits else bundle


def tiny_units(bundle: Path, model: Decoder) -> Units:
    """What 1 means in the int8 caches that `narrow_tiny` gives to `bundle`, a bundle of `model`."""
    manifest, generator = read_manifest(bundle), torch.Generator().manual_seed(5)
    shape = (4, 1, manifest.context)
    tokens = torch.randint(manifest.vocabulary, shape, generator=generator).numpy()
    return cache_units(bundle, manifest, tokens, turning_pairs(model))


def narrow_tiny(bundle: Path, bits: int | None = None) -> Path:
    """A bundle beside `bundle`, the same but with caches in int8, made unless it is there.

    bits: of the matrices, None as they are. Unlike `export_bundle`, this measures no loss. Random
    tokens say how large the caches' numbers are. Raises ValueError where they cannot be int8.
    """
    folder = bundle.with_name(f"{bundle.name}{f'-int{bits}' if bits else ''}-state8")
    with one_at_a_time(folder):
        if not folder.exists():
            manifest, model = read_manifest(bundle), load_decoder(bundle)
            state_tensors(model, pb.DATA_TYPE_INT8)
            packed = pack_weights(model, bits) if bits else {}
            units = tiny_units(bundle, model)
            partial = bundle.with_name(f"{folder.name}-partial")
            shutil.copytree(bundle, partial, dirs_exist_ok=True)
            narrow_caches(partial, manifest, model, units, packed)
            if bits:
                round_activations(partial / "step.onnx")
                manifest.quantisation.bits, manifest.quantisation.block = bits, BLOCK
            files = [file.path for file in manifest.files]
            del manifest.files[:]
            write_manifest(partial, manifest, files)
            partial.rename(folder)
    return folder
