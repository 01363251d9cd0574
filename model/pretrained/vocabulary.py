"""What the tokens of a pretrained model are: its tokenizer, chat template and special tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from concertina.codecs.chat_template import TEMPLATE
from concertina.codecs.tokenizer_file import MOST_BYTES, TOKENIZER, TokenizerError, steps_of
from model.pretrained.files import read_json
from model.pretrained.source import PretrainedError, Vocabulary

_CONFIG, _SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
_TEMPLATE_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def read_vocabulary(folder: Path) -> Vocabulary:
    """What the files of a Hugging Face folder say. Raises PretrainedError."""
    config = _read(folder / _CONFIG)
    special = {**_read(folder / _SPECIAL), **config}
    named = dict(_named(special))
    files: dict[str, bytes] = {}
    if (template := _template(folder, config)) is not None:
        files[TEMPLATE] = template
    if not (folder / TOKENIZER).is_file():
        return Vocabulary(files, named)
    spec = read_json(folder / TOKENIZER, MOST_BYTES)
    files[TOKENIZER] = (folder / TOKENIZER).read_bytes()
    begin = None if config.get("add_bos_token") is False else _begin_token(spec)
    return Vocabulary(files, named, begin)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _named(special: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for kind in _TEMPLATE_TOKENS:
        token = special.get(f"{kind}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            yield f"{kind}_token", token


def _template(folder: Path, config: Mapping[str, Any]) -> bytes | None:
    """The template for conversations: a file of its own or, as it was before, a setting."""
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_bytes()
    given = config.get("chat_template")
    if isinstance(given, list):
        by_name = {each.get("name"): each for each in given if isinstance(each, dict)}
        given = by_name.get("default", {}).get("template")
    return given.encode() if isinstance(given, str) else None


def _begin_token(spec: Mapping[str, Any]) -> int | None:
    """The token that the post-processor puts before a text. Raises PretrainedError."""
    try:
        for step in steps_of(spec.get("post_processor"), "processors"):
            first = (step.get("single") or [{}])[0].get("SpecialToken")
            if step.get("type") == "TemplateProcessing" and first is not None:
                (token,) = step["special_tokens"][first["id"]]["ids"]
                return int(token)
    except (AttributeError, KeyError, TokenizerError, TypeError, ValueError):
        raise PretrainedError(f"{TOKENIZER} has a post_processor that cannot be read") from None
    return None
