"""A Hugging Face folder of a small Llama, written without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SETTINGS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}

TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {"type": "BPE", "vocab": {"<s>": 1, "a": 4, "b": 5, "ab": 6}, "merges": ["a b"]},
    }
)
"""The smallest tokenizer that can be used; it begins every text with token 1."""


def tensors(**changes: Any) -> dict[str, Tensor]:
    """Random weights by name; `changes` are those of the settings."""
    generator = torch.Generator().manual_seed(0)
    settings = {**SETTINGS, **changes}
    size, width, inner = (
        settings[name] for name in ("vocab_size", "hidden_size", "intermediate_size")
    )
    head = width // settings["num_attention_heads"]
    shared = head * settings["num_key_value_heads"]
    shapes = {
        "model.embed_tokens": (size, width),
        "model.norm": (width,),
        "lm_head": (size, width),
    }
    for number in range(settings["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        shapes |= {
            f"{layer}.input_layernorm": (width,),
            f"{layer}.post_attention_layernorm": (width,),
            f"{layer}.self_attn.q_proj": (width, width),
            f"{layer}.self_attn.k_proj": (shared, width),
            f"{layer}.self_attn.v_proj": (shared, width),
            f"{layer}.self_attn.o_proj": (width, width),
            f"{layer}.mlp.gate_proj": (inner, width),
            f"{layer}.mlp.up_proj": (inner, width),
            f"{layer}.mlp.down_proj": (width, inner),
        }
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }


def write(folder: Path, weights: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """The folder; `changes` are those of the settings, and None leaves a setting out."""
    folder.mkdir()
    settings = {key: value for key, value in {**SETTINGS, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors(**changes) if weights is None else weights, folder / "model.safetensors")
    return folder
