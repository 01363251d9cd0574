"""Tiny pretrained models with tokenizers: Hugging Face folders, and what they are exported to."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from export.bundle import export_bundle
from model.layers.architecture import Folding
from model.pretrained.convert import convert
from model.run import CONFIG
from tests.model.pretrained.folders import tensors, write
from tests.once import one_at_a_time
from tests.tokenizers_made import BYTE_LEVEL, content_of, trained

LLAMA, MISTRAL, FOLDED_LLAMA = "llama", "mistral", "folded-llama"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_pretrained_bundle(root: Path, kind: str, context: int = 96) -> Path:
    """Folder of the bundle below `root`, exported unless it is there.

    Two layers, whose heads share keys and values; those of MISTRAL see the last 20 tokens. Of the
    three of FOLDED_LLAMA one is full, one folds and one slides, behind one and two blocks of eight
    tokens. Tokens are those of a byte-level tokenizer, which puts a begin token before a text.
    """
    folder = root / f"pretrained-tokens-{kind}-{context}"
    with one_at_a_time(folder):
        if not folder.exists():
            source, run = (folder.with_name(f"{folder.name}-{name}") for name in ("hf", "run"))
            convert(write_source(source, kind, context), run)
            if kind == FOLDED_LLAMA:
                _fold(run / CONFIG)
            export_bundle(run, folder, name=f"tiny-{kind}")
    return folder


def _fold(config: Path) -> None:
    """Let the layers of the run remember less, as `uptrain` does, with nothing fitted."""
    settings = json.loads(config.read_text())
    folding = Folding(("fold", "full", "window"), sink=1, window=2, summary="tangent")
    settings["model"]["span"] = 8
    settings["model"]["architecture"]["folding"] = asdict(folding)
    config.write_text(json.dumps(settings))


def write_source(folder: Path, kind: str = LLAMA, context: int = 96) -> Path:
    """The Hugging Face folder that the bundle is made of."""
    settings = {**_sizes(kind), **settings_of(kind), "max_position_embeddings": context}
    write(folder, weights_of(kind), **settings)
    (folder / "tokenizer.json").write_bytes(tokenizer_with_begin())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _sizes(kind: str) -> dict[str, int]:
    return {**_SIZES, "num_hidden_layers": 3} if kind == FOLDED_LLAMA else _SIZES


def settings_of(kind: str) -> dict[str, Any]:
    """What `config.json` says besides sizes."""
    tokenizer = trained(BYTE_LEVEL)
    return {
        "model_type": MISTRAL if kind == MISTRAL else LLAMA,
        "vocab_size": tokenizer.get_vocab_size() + 3,  # models often have more rows than tokens
        "bos_token_id": tokenizer.token_to_id("<s>"),
        "eos_token_id": [tokenizer.token_to_id(each) for each in ("</s>", "<|im_end|>")],
        "sliding_window": 20 if kind == MISTRAL else None,
    }


def weights_of(kind: str) -> dict[str, Tensor]:
    """Random weights in which none is neutral, so that some tokens are far likelier than others."""
    weights = tensors(**_sizes(kind), **settings_of(kind))
    for name, weight in weights.items():
        if weight.ndim == 1:
            weights[name] = 1 + weight
        elif "embed" in name:
            weights[name] = weight * weight.shape[1] ** 0.5
        else:
            weights[name] = 1.5 * weight
    return weights


def tokenizer_with_begin() -> bytes:
    """The `tokenizer.json`: it puts `<s>` before a text."""
    begin = trained(BYTE_LEVEL).token_to_id("<s>")
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    second = {"Sequence": {"id": "A", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [first, second],
        "pair": [first, second, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [begin], "tokens": ["<s>"]}},
    }
    return json.dumps({**json.loads(content_of(BYTE_LEVEL)), "post_processor": processor}).encode()
