"""Chat templates in the style of well-known families, rendered as transformers renders them.

That of SmolLM2 is its own (Apache-2.0, Hugging Face); the others are written for this test and do
what those of their families do.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from concertina.codecs.chat_template import ChatTemplate, ChatTemplateError, compiled
from model.pretrained.vocabulary import read_vocabulary
from tests.tokenizers_made import BYTE_LEVEL, trained

_TEMPLATES = sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


_THOUGHT = "<think>\nI add them up.\n</think>\n\n It is 4.\n"
_CHATS = {
    "one question": _said(("user", "What is the capital of France?")),
    "a system message first": _said(("system", "Be brief."), ("user", "Who are you?")),
    "an answer last": _said(("user", "Hi"), ("assistant", "Hello!")),
    "several turns": _said(
        ("system", "  You add.\n\n"),
        ("user", " 1 + 1? \n"),
        ("assistant", "2"),
        ("user", "2 + 2?"),
        ("assistant", _THOUGHT),
        ("user", "And\tthen?"),
    ),
    "a thought last": _said(("user", "2 + 2?"), ("assistant", _THOUGHT)),
    "nothing in them": _said(("system", ""), ("user", ""), ("assistant", ""), ("user", "")),
    "any language": _said(
        ("system", "Ты — помощник. «ok»"),
        ("user", "naïve café 你好 👩‍👩‍👧‍👦 e\u0301 \u2028 مرحبا"),
    ),
    "what looks like a template": _said(
        ("user", "{{ 7 * 7 }} {% raise %} <|im_end|></s> \"quoted\" 'so' <b>&amp; \\n \x00")
    ),
    "two of the user": _said(("user", "One"), ("user", "two")),
    "the assistant first": _said(("assistant", "What may I do?"), ("user", "Sleep")),
    "the system last": _said(("user", "Hi"), ("system", "Be brief."), ("system", "Really.")),
    "the system only": _said(("system", "Be brief.")),
    "an unknown role": _said(("user", "Hi"), ("narrator", "It rains.")),
    "a tool": _said(("user", "Time?"), ("assistant", ""), ("tool", "noon"), ("user", "Thanks")),
}


@cache
def _theirs(template: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=trained(BYTE_LEVEL), chat_template=template.read_text(), **_TOKENS
    )


@cache
def _ours(template: Path) -> ChatTemplate:
    return compiled(template.read_text(), _TOKENS)


def _outcome(render: Any) -> tuple[str, bool]:
    """The text or, if there is an error instead, its message; and whether there is one."""
    try:
        return render(), False
    except Exception as error:
        return str(error), True


def _both(
    template: Path, messages: list[dict[str, str]], asks: bool
) -> tuple[str, bool, str, bool]:
    """The outcome of transformers, and ours. Templates that tell the date see the same day."""
    day = None
    while day != datetime.now().day:
        day = datetime.now().day
        theirs = _outcome(
            lambda: _theirs(template).apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asks
            )
        )
        ours = _outcome(lambda: _ours(template).render(messages, add_generation_prompt=asks))
    return *theirs, *ours


@pytest.mark.parametrize("chat", _CHATS)
@pytest.mark.parametrize("template", _TEMPLATES, ids=lambda path: path.stem)
def test_a_conversation_is_rendered_as_transformers_does(template: Path, chat: str) -> None:
    for asks in (True, False):
        expected, fails, text, refused = _both(template, _CHATS[chat], asks)
        assert refused == fails, (text, expected)
        assert expected in text if fails else text == expected


@pytest.mark.parametrize(
    ("family", "chat", "words"),
    [
        ("mistral", "two of the user", "roles must alternate"),
        ("gemma", "the assistant first", "roles must alternate"),
        ("vicuna", "two of the user", "but number 2 is user"),
        ("command_r", "an unknown role", "narrator, user; user and assistant are known"),
    ],
)
def test_what_a_template_refuses_is_said_in_its_words(family: str, chat: str, words: str) -> None:
    with pytest.raises(ChatTemplateError, match=f"refuses them: .*{words}"):
        _ours(_TEMPLATES[0].with_name(f"{family}.jinja")).render(_CHATS[chat])


def test_there_are_eleven_families_and_none_is_another_s_copy() -> None:
    assert len(_TEMPLATES) >= 11
    texts = {
        tuple(_ours(path).render(_CHATS[chat]) for chat in ("one question", "an answer last"))
        for path in _TEMPLATES
    }
    assert len(texts) == len(_TEMPLATES)


@pytest.mark.parametrize("template", _TEMPLATES, ids=lambda path: path.stem)
def test_a_saved_tokenizer_brings_its_template(template: Path, tmp_path: Path) -> None:
    """As save_pretrained writes it, and as older releases did: in tokenizer_config.json."""
    theirs = _theirs(template)
    theirs.save_pretrained(tmp_path)
    kept = read_vocabulary(tmp_path)
    text = kept.files["chat_template.jinja"].decode()
    assert (text, kept.template_tokens) == (template.read_text(), theirs.special_tokens_map)
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = text
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_vocabulary(tmp_path).files["chat_template.jinja"].decode() == text


@pytest.mark.parametrize(
    "source",
    [
        "{% set ns = namespace(_hidden=1) %}{{ ns._hidden }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}done",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}done",
        "{% set ns = namespace({'__init__': 1}, b=2) %}{{ ns.b }}",
        "{% set ns = namespace({'a': 1}, b=2) %}{{ ns.a }}{{ ns.b }}{{ ns.c is defined }}",
        "{% set ns = namespace(self=1) %}{{ ns.self }}",
        "{{ dict(a=1).get('a') }}{{ dict({'b': 2}, c=3).items() | list }}",
        "{{ dict.fromkeys(['a', 'b'], 3) }}",
        "{{ dict.mro() }}",
        "{{ dict.__subclasses__() }}",
        "{{ dict.update(messages[0], {'role': 'x'}) }}{{ messages[0].role }}",
        "{{ ''.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ (messages | first).update({'role': 'x'}) }}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}",
        "{{ x | default(4096) }}{{ 'b' | default(99999) }}",
        "{{ raise_exception('no ' ~ 'way') }}",
        "{{ tools is none }}{{ documents is none }}{{ bos_token }}{{ pad_token is defined }}",
    ],
)
def test_corners_of_the_sandbox_are_those_of_transformers(source: str) -> None:
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=trained(BYTE_LEVEL), chat_template=source, **_TOKENS
    )
    messages = _CHATS["one question"]
    expected, fails = _outcome(lambda: theirs.apply_chat_template(messages, tokenize=False))
    text, refused = _outcome(
        lambda: compiled(source, _TOKENS).render(messages, add_generation_prompt=False)
    )
    assert refused == fails, (text, expected)
    assert fails or text == expected
