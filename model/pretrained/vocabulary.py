"""What the tokens of a pretrained model are: its tokenizer, chat template and special tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from concertina.codecs.chat_template import (
    MOST_CHARACTERS,
    TEMPLATE,
    ChatTemplateError,
    HarmfulTemplateError,
    compiled,
)
from concertina.codecs.starts import TokenStarts
from concertina.codecs.tokenizer_codec import tokenizer_codec
from concertina.codecs.tokenizer_file import (
    MOST_BYTES,
    TOKENIZER,
    TokenizerError,
    read_spec,
    steps_of,
)
from model.pretrained.files import find_file, read_file, read_json
from model.pretrained.source import PretrainedError, Vocabulary

_CONFIG, _SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
_LONGEST_TOKEN = 1000
_TEMPLATE_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def read_vocabulary(folder: Path) -> Vocabulary:
    """What the files of a Hugging Face folder say. Raises PretrainedError."""
    config = _read(folder, _CONFIG)
    special = {**_read(folder, _SPECIAL), **config}
    named = dict(_named(special))
    files: dict[str, bytes] = {}
    if (template := _template(folder, config)) is not None:
        files[TEMPLATE] = template
    if (tokenizer := find_file(folder, TOKENIZER)) is None:
        return Vocabulary(files, named)
    files[TOKENIZER] = read_file(tokenizer, MOST_BYTES)
    try:
        spec = read_spec(files[TOKENIZER])
    except TokenizerError as error:
        raise PretrainedError(f"{tokenizer} {error}") from None
    begin = None if config.get("add_bos_token") is False else _begin_token(spec)
    return Vocabulary(files, named, begin)


def require_usable(vocabulary: Vocabulary, size: int) -> None:
    """Raise PretrainedError for files that no server would take, or whose template does harm.

    size: number of the model's tokens.
    """
    try:
        if content := vocabulary.files.get(TOKENIZER):
            tokenizer_codec(TokenStarts("the model", size), content)
    except TokenizerError as error:
        raise PretrainedError(f"{TOKENIZER} {error}") from None
    if (written := vocabulary.files.get(TEMPLATE)) is None:
        return
    try:
        template = compiled(written.decode(), vocabulary.template_tokens)
    except (ChatTemplateError, UnicodeDecodeError) as error:
        raise PretrainedError(f"{TEMPLATE} {error}") from None
    try:
        template.render([{"role": "user", "content": "Hello"}])
    except HarmfulTemplateError as error:
        raise PretrainedError(
            f"{TEMPLATE} does harm: {error}; take it away, and give another with `serve "
            "--chat-template`"
        ) from None
    except ChatTemplateError:
        pass  # it may want other messages


def _read(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder, name) if find_file(folder, name) else {}


def _named(special: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for kind in _TEMPLATE_TOKENS:
        token = special.get(f"{kind}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            if len(token) > _LONGEST_TOKEN:
                raise PretrainedError(f"{kind}_token has {len(token):,} characters: it is no token")
            yield f"{kind}_token", token


def _template(folder: Path, config: Mapping[str, Any]) -> bytes | None:
    """The template for conversations: a file of its own or, as it was before, a setting."""
    if path := find_file(folder, TEMPLATE):
        return read_file(path, 4 * MOST_CHARACTERS)
    given = config.get("chat_template")
    if isinstance(given, list):
        found = (each for each in given if isinstance(each, dict) and each.get("name") == "default")
        given = next(found, {}).get("template")
    return given.encode(errors="replace") if isinstance(given, str) else None


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
