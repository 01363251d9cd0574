"""Small models of every supported architecture, with random weights in which nothing is neutral."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama(**changes: Any) -> Any:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**BASE, **changes}))


def _mistral() -> Any:
    return tf.MistralForCausalLM(tf.MistralConfig(**BASE, sliding_window=20))


def _qwen2() -> Any:
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**BASE))


def _qwen3() -> Any:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**BASE, head_dim=32))


def _smollm3() -> Any:
    settings = {**BASE, "num_hidden_layers": 4, "pad_token_id": 0}
    return tf.SmolLM3ForCausalLM(tf.SmolLM3Config(**settings))


def _gpt2() -> Any:
    sizes = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 160}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=97, **sizes, **tokens))


def _gpt_neox() -> Any:
    settings = {
        **{name: value for name, value in BASE.items() if name != "num_key_value_heads"},
        "hidden_size": 128,
        "num_attention_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.25,
        },
    }
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**settings))


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "llama3": lambda: _llama(rope_parameters=LLAMA3, tie_word_embeddings=True),
    "yarn": lambda: _llama(rope_parameters=YARN, attention_bias=True, mlp_bias=True),
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
    "gpt2": _gpt2,
    "gpt-neox": _gpt_neox,
}


def make(name: str, seed: int = 5) -> Any:
    """The model of transformers, in float32."""
    model = ARCHITECTURES[name]().eval().float()
    generator = torch.Generator().manual_seed(seed)
    for each, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            is_scale = ("norm" in each or "ln_" in each) and not each.endswith("bias")
            weight.data = 0.5 * noise + float(is_scale)
        elif "emb" in each or "wte" in each or "wpe" in each:
            weight.data = noise
        else:
            weight.data = noise * 1.2 * weight.shape[-1] ** -0.5
    model.tie_weights()
    return model


def save(model: Any, folder: Path, **settings: Any) -> Path:
    """The folder that transformers writes; `settings` are those of `save_pretrained`."""
    model.save_pretrained(folder, **settings)
    return folder
