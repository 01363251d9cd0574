"""Which tensors of a pretrained model make up each parameter of a decoder."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.pretrained.settings import LLAMA_LIKE
from model.pretrained.source import PretrainedError, Tensors

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """A parameter: tensors and their shapes, one below the other, and what is done to the whole."""

    parts: tuple[tuple[str, Shape], ...]
    finish: Callable[[Tensor], Tensor] = torch.Tensor.contiguous

    def read(self, tensors: Tensors) -> Tensor:
        """The parameter."""
        parts = [tensors.read(name) for name, _ in self.parts]
        return self.finish(parts[0] if len(parts) == 1 else torch.cat(parts))


def find_parameters(tensors: Tensors, config: ModelConfig, family: str) -> dict[str, Recipe]:
    """What each parameter of a decoder is made of; the head is left out if it is tied.

    Raises PretrainedError if a tensor is missing, has another shape, or is not used.
    """
    prefix = "" if tensors.shape(_first(family)) is not None else PREFIXES[family]
    found = recipes(config, family, prefix)
    for recipe in found.values():
        for part, shape in recipe.parts:
            _check(tensors, part, shape)
    used = {part for recipe in found.values() for part, _ in recipe.parts}
    if left := [name for name in tensors.names() if name not in used and not _IGNORED.search(name)]:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise PretrainedError(
            f"the model has tensors that {family} does not use: {', '.join(left[:3])}{more}; it is "
            "of another kind"
        )
    return found


def recipes(config: ModelConfig, family: str, prefix: str) -> dict[str, Recipe]:
    """The same, of whatever tensors; prefix: of their names, but for the head's."""
    found = {
        name: Recipe(tuple((prefix + part, shape) for part, shape in recipe.parts), recipe.finish)
        for name, recipe in _body(config, family).items()
    }
    if not config.architecture.tied:
        found["head.weight"] = Recipe(((_HEADS[family], (config.vocabulary, config.width)),))
    return found


PREFIXES = {**dict.fromkeys(LLAMA_LIKE, "model."), "gpt2": "transformer.", "gpt_neox": "gpt_neox."}
_HEADS = {**dict.fromkeys(LLAMA_LIKE, "lm_head.weight"), "gpt2": "lm_head.weight"}
_HEADS["gpt_neox"] = "embed_out.weight"
_IGNORED = re.compile(r"(^lm_head\.weight|\.inv_freq|\.attn\.bias|\.masked_bias|attention\.bias)$")
"""What follows from other tensors: a head that is tied, frequencies, and masks."""


def _first(family: str) -> str:
    """The embeddings of tokens, in a checkpoint without a head, whose names have no prefix."""
    return {"gpt2": "wte.weight", "gpt_neox": "embed_in.weight"}.get(family, "embed_tokens.weight")


def _check(tensors: Tensors, name: str, shape: Shape) -> None:
    there = tensors.shape(name)
    if there is None:
        raise PretrainedError(f"the model lacks the tensor {name}: its files are not complete")
    if there != shape:
        raise PretrainedError(
            f"{name} has shape {_written(there)}, and the settings of the model say "
            f"{_written(shape)}: they do not belong together"
        )


def _written(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "()"


def _body(config: ModelConfig, family: str) -> dict[str, Recipe]:
    if family == "gpt2":
        return _gpt2(config)
    return _gpt_neox(config) if family == "gpt_neox" else _llama(config)


def _llama(config: ModelConfig) -> dict[str, Recipe]:
    built, width, dim = config.architecture, config.width, config.head_dim
    sizes = [config.heads * dim, config.kv_heads * dim, config.kv_heads * dim]
    found = {
        "embed.weight": Recipe((("embed_tokens.weight", (config.vocabulary, width)),)),
        "norm.weight": Recipe((("norm.weight", (width,)),)),
    }

    def matrix(ours: str, theirs: list[str], rows: list[int], columns: int, biased: bool) -> None:
        pairs = [*zip(theirs, rows, strict=True)]
        found[f"{ours}.weight"] = Recipe(
            tuple((f"{name}.weight", (count, columns)) for name, count in pairs)
        )
        if biased:
            found[f"{ours}.bias"] = Recipe(
                tuple((f"{name}.bias", (count,)) for name, count in pairs)
            )

    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}", f"layers.{layer}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        for mine, name in (("attention", "input"), ("mlp", "post_attention")):
            found[f"{ours}.norm_{mine}.weight"] = Recipe(
                ((f"{theirs}.{name}_layernorm.weight", (width,)),)
            )
        projections = [f"{attention}.{letter}_proj" for letter in "qkv"]
        matrix(f"{ours}.qkv", projections, sizes, width, "qkv" in built.biases)
        matrix(f"{ours}.out", [f"{attention}.o_proj"], [width], sizes[0], "out" in built.biases)
        ups, biased = [f"{mlp}.gate_proj", f"{mlp}.up_proj"], "mlp" in built.biases
        matrix(f"{ours}.up", ups, [config.mlp] * 2, width, biased)
        matrix(f"{ours}.down", [f"{mlp}.down_proj"], [width], config.mlp, biased)
        if built.head_norms:
            for mine, letter in (("queries", "q"), ("keys", "k")):
                found[f"{ours}.norm_{mine}.weight"] = Recipe(
                    ((f"{attention}.{letter}_norm.weight", (dim,)),)
                )
    return found


def _both(found: dict[str, Recipe], ours: str, theirs: str, width: int) -> None:
    """A norm with its bias."""
    for part in ("weight", "bias"):
        found[f"{ours}.{part}"] = Recipe(((f"{theirs}.{part}", (width,)),))


def _gpt2(config: ModelConfig) -> dict[str, Recipe]:
    """Its matrices lie on their side."""
    width, mlp = config.width, config.mlp
    found = {
        "embed.weight": Recipe((("wte.weight", (config.vocabulary, width)),)),
        "positions.weight": Recipe((("wpe.weight", (config.context, width)),)),
    }
    _both(found, "norm", "ln_f", width)
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}", f"h.{layer}"
        _both(found, f"{ours}.norm_attention", f"{theirs}.ln_1", width)
        _both(found, f"{ours}.norm_mlp", f"{theirs}.ln_2", width)
        for mine, name, rows, columns in (
            ("qkv", "attn.c_attn", 3 * width, width),
            ("out", "attn.c_proj", width, width),
            ("up", "mlp.c_fc", mlp, width),
            ("down", "mlp.c_proj", width, mlp),
        ):
            found[f"{ours}.{mine}.weight"] = Recipe(
                ((f"{theirs}.{name}.weight", (columns, rows)),), _upright
            )
            found[f"{ours}.{mine}.bias"] = Recipe(((f"{theirs}.{name}.bias", (rows,)),))
    return found


def _upright(matrix: Tensor) -> Tensor:
    return matrix.T.contiguous()


def _gpt_neox(config: ModelConfig) -> dict[str, Recipe]:
    """Query, key and value of a head follow each other; ours are all queries, keys, values."""
    width, mlp, heads = config.width, config.mlp, config.heads
    biases = config.architecture.biases

    def sort_heads(rows: Tensor) -> Tensor:
        by_head = rows.view(heads, 3, config.head_dim, *rows.shape[1:])
        return by_head.transpose(0, 1).reshape(rows.shape)

    found = {"embed.weight": Recipe((("embed_in.weight", (config.vocabulary, width)),))}
    _both(found, "norm", "final_layer_norm", width)
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}", f"layers.{layer}"
        _both(found, f"{ours}.norm_attention", f"{theirs}.input_layernorm", width)
        _both(found, f"{ours}.norm_mlp", f"{theirs}.post_attention_layernorm", width)
        for mine, name, rows, columns in (
            ("qkv", "attention.query_key_value", 3 * width, width),
            ("out", "attention.dense", width, width),
            ("up", "mlp.dense_h_to_4h", mlp, width),
            ("down", "mlp.dense_4h_to_h", width, mlp),
        ):
            finish = sort_heads if mine == "qkv" else torch.Tensor.contiguous
            found[f"{ours}.{mine}.weight"] = Recipe(
                ((f"{theirs}.{name}.weight", (rows, columns)),), finish
            )
            if mine in biases or (mine in ("up", "down") and "mlp" in biases):
                found[f"{ours}.{mine}.bias"] = Recipe(((f"{theirs}.{name}.bias", (rows,)),), finish)
    return found
