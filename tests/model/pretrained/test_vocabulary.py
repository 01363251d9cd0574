"""Tokenizers, templates and special tokens of pretrained models, as their bundles have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from concertina.bundle.manifest import read_manifest
from export.bundle import export_bundle
from model.pretrained.convert import convert
from model.pretrained.gguf_vocabulary import vocabulary_of
from model.pretrained.source import PretrainedError
from model.pretrained.vocabulary import read_vocabulary
from tests.model.pretrained.folders import TOKENIZER, write
from tests.tokenizers_made import BYTE_LEVEL, TEXTS, content_of, trained

MODEL = {"type": "BPE", "vocab": {}, "merges": []}
BEGINS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}


def folder_of(path: Path, **files: Any) -> Path:
    """A folder with these files: JSON, or text where a string is given."""
    path.mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_a_folder_says_what_its_tokens_are(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "tiny",
        tokenizer__json={"model": MODEL, "post_processor": BEGINS},
        special_tokens_map__json={"unk_token": {"content": "<unk>"}, "eos_token": "</s>"},
        tokenizer_config__json={
            "bos_token": "<s>",
            "eos_token": "<|im_end|>",
            "chat_template": "old",
        },
    )
    found = read_vocabulary(folder)
    assert found.template_tokens == {
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
    }
    assert found.begin_token == 1
    assert found.files["chat_template.jinja"] == b"old"
    assert found.files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()


def test_a_template_of_its_own_counts_more(tmp_path: Path) -> None:
    many = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    one = folder_of(tmp_path / "one", tokenizer_config__json={"chat_template": many})
    assert read_vocabulary(one).files == {"chat_template.jinja": b"d"}
    (one / "chat_template.jinja").write_text("file")
    assert read_vocabulary(one).files == {"chat_template.jinja": b"file"}
    nothing = read_vocabulary(folder_of(tmp_path / "none"))
    assert (nothing.files, nothing.template_tokens, nothing.begin_token) == ({}, {}, None)


@pytest.mark.parametrize(
    ("processor", "config", "begin"),
    [
        (None, {}, None),
        ({"type": "ByteLevel"}, {}, None),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, BEGINS]}, {}, 1),
        (BEGINS, {"add_bos_token": False}, None),
        ({**BEGINS, "single": [{"Sequence": {"id": "A"}}]}, {}, None),
    ],
)
def test_the_begin_token_is_what_the_tokenizer_puts_first(
    processor: Any, config: Any, begin: int | None, tmp_path: Path
) -> None:
    tokenizer = {"model": MODEL, "post_processor": processor}
    folder = folder_of(tmp_path / "tiny", tokenizer__json=tokenizer, tokenizer_config__json=config)
    assert read_vocabulary(folder).begin_token == begin


@pytest.mark.parametrize(
    "processor", [7, {"type": "TemplateProcessing", "single": 3}, {**BEGINS, "special_tokens": {}}]
)
def test_a_broken_post_processor_is_refused(processor: Any, tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "tiny", tokenizer__json={"model": MODEL, "post_processor": processor}
    )
    with pytest.raises(PretrainedError, match="post_processor that cannot be read"):
        read_vocabulary(folder)


def test_a_bundle_has_what_the_folder_has(tmp_path: Path) -> None:
    source = write(tmp_path / "hf")
    (source / "tokenizer.json").write_text(TOKENIZER)
    (source / "tokenizer_config.json").write_text('{"bos_token": "<s>", "chat_template": "hi"}')
    convert(source, tmp_path / "run")
    export_bundle(tmp_path / "run", tmp_path / "bundle", name="tiny")
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.tokenizer.begin_token == 1
    assert dict(manifest.tokenizer.template_tokens) == {"bos_token": "<s>"}
    assert (tmp_path / "bundle" / "chat_template.jinja").read_text() == "hi"
    assert {file.path for file in manifest.files} == {
        "step.onnx",
        "tokenizer.json",
        "chat_template.jinja",
    }


def fields(**changes: Any) -> dict[str, Any]:
    """The fields of a GGUF file for the tokenizer that `tokenizers_made` trains on bytes."""
    spec = json.loads(content_of(BYTE_LEVEL))
    added = {each["id"]: each for each in spec["added_tokens"]}
    vocabulary = {**spec["model"]["vocab"], **{a["content"]: n for n, a in added.items()}}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    kinds = [
        1 if number not in added else 3 if added[number]["special"] else 4
        for number in range(len(tokens))
    ]
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    made = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": kinds,
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in {**made, **changes}.items()}


def test_the_tokenizer_of_a_gguf_file_is_that_of_the_folder() -> None:
    found = vocabulary_of({**fields(), "tokenizer.chat_template": "hi"})
    ours = Tokenizer.from_buffer(found.files["tokenizer.json"])
    theirs = trained(BYTE_LEVEL)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids) == theirs.decode(ids), text
    assert found.files["chat_template.jinja"] == b"hi"
    assert found.template_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert found.begin_token is None


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("gpt-2", ["12345", " don", "'", "T"]),
        ("smollm", ["1", "2", "3", "4", "5", " don", "'", "T"]),
        ("llama-bpe", ["123", "45", " don", "'T"]),
        ("qwen2", ["1", "2", "3", "4", "5", " don", "'T"]),
        ("tekken", ["1", "2", "3", "4", "5", " don", "'T"]),
    ],
)
def test_text_is_cut_as_the_file_says(kind: str, parts: list[str]) -> None:
    found = vocabulary_of(fields(pre=kind))
    cut = Tokenizer.from_buffer(found.files["tokenizer.json"]).pre_tokenizer
    pieces = [piece.replace("\u0120", " ") for piece, _ in cut.pre_tokenize_str("12345 don'T")]
    assert pieces == parts
    assert found.begin_token == (1 if kind in ("llama-bpe", "tekken") else None)


@pytest.mark.parametrize(("adds", "begin"), [(True, 1), (False, None)])
def test_a_gguf_file_says_whether_a_token_comes_first(adds: bool, begin: int | None) -> None:
    assert vocabulary_of(fields(add_bos_token=adds, pre="llama-bpe")).begin_token == begin


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "t5"}, "tokenizer of the kind 't5'; of GGUF files, supported are 'llama', and"),
        ({"model": ["a"] * 999}, r"of the kind \['a', .* \(length 999\); of GGUF files"),
        *(
            ({"pre": kind}, f"'gpt2' with {kind!r}; of GGUF files, supported are 'llama', and")
            for kind in (
                "default",
                "deepseek-llm",
                "deepseek-r1-qwen",
                "gpt-4o",
                "qwen35",
                "",
                None,
            )
        ),
        ({"pre": ["qwen2"]}, r"'gpt2' with \['qwen2'\]"),
        ({"tokens": "ab"}, "tokens is 'ab': it has to be a list of str"),
        ({"tokens": [1, 2]}, "tokens is .*: it has to be a list of str"),
        ({"merges": [1]}, "merges is .*: it has to be a list of str"),
        ({"token_type": 3}, "token_type is 3: it has to be a list of int"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "tokens twice"),
        ({"token_type": [1]}, "without a type"),
        ({"merges": ["a"]}, "merges what are no tokens"),
        ({"merges": ["a never"]}, "merges what are no tokens"),
    ],
)
def test_a_tokenizer_that_is_not_wholly_known_is_refused(changes: Any, words: str) -> None:
    with pytest.raises(PretrainedError, match=words):
        vocabulary_of(fields(**changes))
