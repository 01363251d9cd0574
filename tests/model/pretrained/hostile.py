"""Models that are made to hurt: their files lie, loop, or are larger than any memory."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.model.pretrained.folders import TOKENIZER, tensors, write

_MERGES = b'{"model":{"type":"BPE","vocab":{},"merges":['
_LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
_GROWS = (
    "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}{{ ns.x }}"
)


def _folder(path: Path, template: str = "", **changes: Any) -> Path:
    folder = write(path, tensors(), **changes)
    (folder / "tokenizer.json").write_text(TOKENIZER)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def _long_header(path: Path) -> Path:
    with (_folder(path) / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 1 << 32))
        file.truncate(5 << 30)  # sparse: it takes no room
    return path


def _cut(path: Path) -> Path:
    file = _folder(path) / "model.safetensors"
    os.truncate(file, file.stat().st_size - 64)
    return path


def _billion_merges(path: Path) -> Path:
    with (_folder(path) / "tokenizer.json").open("wb") as file:
        file.write(_MERGES)
        file.truncate(10 << 30)
    return path


def _many_merges(path: Path) -> Path:
    pair = b'["a","b"],'
    content = _MERGES + pair * ((40 << 20) // len(pair)) + b'["a","b"]]}}'
    (_folder(path) / "tokenizer.json").write_bytes(content)
    return path


def _spec(path: Path, **changes: Any) -> Path:
    spec = json.loads(TOKENIZER)
    (_folder(path) / "tokenizer.json").write_text(json.dumps({**spec, **changes}))
    return path


def _other_tokenizer(path: Path) -> Path:
    model = {"type": "BPE", "vocab": {"<s>": 1, "a": 30_000}, "merges": []}
    return _spec(path, model=model)


def _exploding_tokenizer(path: Path) -> Path:
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 64}
    model = {"type": "BPE", "vocab": {"<s>": 1, "a" * 500: 2}, "merges": []}
    return _spec(path, model=model, decoder={"type": "Sequence", "decoders": [replace] * 9})


def _wide(path: Path) -> Path:
    return _folder(path, vocab_size=2**24, hidden_size=2**20, head_dim=2**16)


def _items(path: Path) -> Path:
    (_folder(path) / "config.json").write_text('{"model_type": [' + "[]," * 4_000_000 + "0]}")
    return path


def _infinite(path: Path) -> Path:
    weights = tensors()
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    return write(path, weights)


def _link(path: Path) -> Path:
    (_folder(path) / "chat_template.jinja").symlink_to("/etc/passwd")
    return path


def _gguf(path: Path, *parts: bytes, size: int = 0) -> Path:
    file = path.with_suffix(".gguf")
    with file.open("wb") as opened:
        opened.write(b"GGUF" + struct.pack("<I", 3) + b"".join(parts))
        if size:
            opened.truncate(size)
    return file


def _long_name(path: Path) -> Path:
    """A header of which the first name has 8 GB."""
    return _gguf(path, struct.pack("<QQQ", 0, 1, 8 << 30), size=9 << 30)


def _shared(path: Path) -> Path:
    """Tensors that lie in one another: a kilobyte would be a model of any size."""
    listed = [
        struct.pack("<Q", 1) + name + struct.pack("<IQIQ", 1, 8, 0, 0) for name in (b"a", b"b")
    ]
    return _gguf(path, struct.pack("<QQ", 2, 0), *listed, size=4096)


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a safetensors header of 4 GB": (_long_header, "begins with a header of 4,294,967,296 bytes"),
    "weights cut short": (_cut, "model.safetensors is damaged or incomplete"),
    "a tokenizer with a billion merges": (_billion_merges, "10,737,418,240 bytes, the limit is"),
    "a tokenizer with four million merges": (_many_merges, "items, the limit is 4,000,000"),
    "the tokenizer of another model": (_other_tokenizer, "ids must be below the model's 11"),
    "a tokenizer whose tokens explode": (_exploding_tokenizer, "has a token of 32,000 characters"),
    "a template that loops": (
        lambda path: _folder(path, _LOOPS),
        "chat_template.jinja does harm: the chat template .* does it loop",
    ),
    "a template that grows": (lambda path: _folder(path, _GROWS), "does harm: .* does it loop"),
    "a template that reaches for Python": (
        lambda path: _folder(path, "{{ ''.__class__.__mro__ }}"),
        "does harm: .*SecurityError",
    ),
    "a template that is none": (
        lambda path: _folder(path, "{% for"),
        "chat_template.jinja is no template",
    ),
    "sizes beyond any memory": (_wide, "has shape 11x16, and .* say 16777216x1048576"),
    "settings with millions of items": (_items, "config.json has about .* items, the limit is"),
    "a setting that is endless": (
        lambda path: _folder(path, rope_theta=math.inf),
        "rope_theta of the rotary positions is inf: it must be above 0",
    ),
    "a setting of another type": (
        lambda path: _folder(path, model_type=["llama"] * 9999),
        r"model_type is \['llama', .*length 9,999",
    ),
    "weights that are no numbers": (_infinite, "up_proj.weight has values that are no finite"),
    "a link that leads out of the folder": (_link, "is a link that leads out of the folder"),
    "a name of 8 GB": (_long_name, "has a header of more than 134,217,728 bytes"),
    "tensors in one another": (_shared, "the tensor b lies in another"),
}
"""By what they are: what writes such a model to a path, and what is said of it."""
