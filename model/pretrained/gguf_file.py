"""A GGUF file, in the words of Hugging Face: its settings, and its tensors by their names there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from concertina.shown import cut, shown
from model.pretrained.gguf_header import Header, Stored, read_header
from model.pretrained.gguf_vocabulary import vocabulary_of
from model.pretrained.source import UNKNOWN_LICENSE, PretrainedError, Source

SUFFIX = ".gguf"

_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3"}
_INTERLEAVED = ("llama", "smollm3")
"""Architectures whose rows of q and k are stored in pairs: llama.cpp turns neighbours."""
_KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
_DIVISORS, _MOST_DIVISORS = "rope_freqs.weight", 1 << 16
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


class _Blocks:
    """Tensors of one file, read where they lie."""

    def __init__(self, path: Path, header: Header, heads: dict[str, int]) -> None:
        self._path, self._heads = path, heads
        self._stored = {
            _name(name): stored for name, stored in header.tensors.items() if name != _DIVISORS
        }

    def names(self) -> list[str]:
        """See Tensors."""
        return sorted(self._stored)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See Tensors."""
        stored = self._stored.get(name)
        return None if stored is None else stored.shape

    def read(self, name: str) -> Tensor:
        """See Tensors."""
        tensor = read_tensor(self._path, name, self._stored[name])
        for part, heads in self._heads.items():
            if f".{part}_proj." in name:
                return _sort_halves(tensor, heads)
        return tensor


@contextmanager
def open_gguf(path: Path) -> Iterator[Source]:
    """The model in the file `path`. Raises PretrainedError."""
    header = read_header(path)
    settings = _settings(header)
    heads = {}
    if header.fields["general.architecture"] in _INTERLEAVED:
        counts = ("num_attention_heads", "num_key_value_heads")
        heads = {part: settings.get(name, 0) for part, name in zip("qk", counts, strict=True)}
    divisors: tuple[float, ...] = ()
    if _DIVISORS in header.tensors:
        if (size := header.tensors[_DIVISORS].bytes) > _MOST_DIVISORS:
            raise PretrainedError(f"{_DIVISORS} has {size:,} bytes, the limit is {_MOST_DIVISORS}")
        divisors = tuple(read_tensor(path, _DIVISORS, header.tensors[_DIVISORS]).tolist())
    license = header.fields.get("general.license")
    license = cut(license, 80) if isinstance(license, str) else UNKNOWN_LICENSE
    tensors = _Blocks(path, header, heads)
    vocabulary = vocabulary_of(header.fields)
    yield Source(path, settings, tensors, (path,), license, divisors, vocabulary)


def read_tensor(path: Path, name: str, stored: Stored) -> Tensor:
    """A tensor of a GGUF file; in float32 if it is stored in blocks."""
    if stored.kind.name not in _KINDS:
        raise PretrainedError(
            f"{name} is stored as {stored.kind.name}; supported are {', '.join(_KINDS)}"
        )
    raw = np.fromfile(path, np.uint8, stored.bytes, offset=stored.begin)
    if stored.kind == GGMLQuantizationType.F32:
        return torch.from_numpy(raw.view(np.float32)).view(stored.shape)
    if stored.kind == GGMLQuantizationType.F16:
        return torch.from_numpy(raw.view(np.float16)).view(stored.shape)
    if stored.kind == GGMLQuantizationType.BF16:
        return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16).view(stored.shape)
    rows = raw.reshape(*stored.shape[:-1], -1)
    return torch.from_numpy(dequantize(rows, stored.kind)).view(stored.shape)


def _name(name: str) -> str:
    """The Hugging Face name of a tensor; what has none keeps its own, and is refused later."""
    found = _TENSOR.fullmatch(name)
    if found is None or found[2] not in _NAMES:
        return name
    layer = f"model.layers.{int(found[1])}." if found[1] else ""
    return f"{layer}{_NAMES[found[2]]}.{found[3]}"


def _sort_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k with the two channels of a pair half a head apart, not side by side."""
    if rows.shape[0] % (2 * heads):
        raise PretrainedError(f"{rows.shape[0]} rows of q or k are not {heads} heads")
    by_pair = rows.view(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return by_pair.transpose(1, 2).reshape(rows.shape)


def _settings(header: Header) -> dict[str, Any]:
    fields = header.fields
    kind = fields.get("general.architecture")
    if kind not in [*_FAMILIES]:
        raise PretrainedError(
            f"general.architecture is {shown(kind)}; of GGUF files, supported are "
            f"{', '.join(_FAMILIES)}: take the model's Hugging Face folder"
        )

    def get(name: str) -> Any:
        return fields.get(f"{kind}.{name}")

    embeddings = header.tensors.get("token_embd.weight")
    dims = get("attention.key_length"), get("attention.value_length")
    if dims[0] != dims[1]:
        raise PretrainedError(
            f"keys have {shown(dims[0])} channels and values {shown(dims[1])}: not supported"
        )
    biased = "blk.0.attn_output.bias" in header.tensors
    settings = {
        "model_type": "mistral" if get("attention.sliding_window") else _FAMILIES[kind],
        "_name_or_path": fields.get("general.name"),
        "vocab_size": embeddings.shape[0] if embeddings else None,
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv") or get("attention.head_count"),
        "head_dim": dims[0],
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base"),
        "rope_scaling": _scaling(get),
        "sliding_window": get("attention.sliding_window"),
        "num_experts": get("expert_count"),
        "attention_bias": biased,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _ends(fields) or None,
    }
    return {name: value for name, value in settings.items() if value is not None}


def _ends(fields: dict[str, Any]) -> list[Any]:
    """The tokens that end a text or, in a conversation, what one side says."""
    found = (fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot"))
    return list(dict.fromkeys(token for token in found if token is not None))


def _scaling(get: Any) -> dict[str, Any] | None:
    kind = get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    return {
        "rope_type": kind,
        "factor": get("rope.scaling.factor"),
        "original_max_position_embeddings": get("rope.scaling.original_context_length"),
        "attention_factor": get("rope.scaling.attn_factor"),
    }
