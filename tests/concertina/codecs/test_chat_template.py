"""Chat templates: what they make of messages, and that all of them end."""

from __future__ import annotations

import resource
import time
from datetime import datetime

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from concertina.codecs.chat_template import MOST_CHARACTERS, ChatTemplateError, compiled

_CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you? <é>"},
    {"role": "assistant", "content": " A model. "},
    {"role": "user", "content": "{{ 7 * 7 }}"},
]
_CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
_BLOCKS = """
    {%- set ns = namespace(turns=0, found=[]) %}
    {%- for message in messages if message.role != 'system' %}
        {%- set ns.turns = ns.turns + 1 %}
        {%- set ns.found = ns.found + [message.content | trim] %}
        {%- if loop.index > 2 %}{% continue %}{% endif %}
{{ message.role | upper }}: {{ message.content | trim }} ({{ loop.length }})
    {%- endfor %}
{{ ns.turns ~ ' turns: ' ~ ns.found | join(', ') }}
{%- macro told(name, times=2) %}{% for _ in range(times) %}{{ name }};{% endfor %}{% endmacro %}
{{ told('x') }}{{ messages[-1]['content'].split('*')[0].replace('{', '[') }}
{{ messages[0] | tojson }}{{ {'a': [1, 2], 'b': none} | tojson(indent=2) }}
{%- for key, value in {'b': 1, 'a': 2}.items() %}{{ key }}={{ value }} {% endfor %}
{{ messages | map(attribute='role') | list | length }} {{ 'x' * 3 }} {{ '%s-%d' % ('a', 3) }}
{{ messages | selectattr('role', 'equalto', 'user') | list | count }} {{ 2 ** 3 }} {{ (1, 2)[0] }}
"""


@pytest.mark.parametrize("source", [_CHATML, _LLAMA_2, _BLOCKS])
@pytest.mark.parametrize("messages", [_CHAT, _CHAT[1:2]])
def test_a_template_makes_what_plain_jinja_makes(
    source: str, messages: list[dict[str, str]]
) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    plain = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    template = compiled(source, tokens)
    plain.filters["tojson"] = template.template.environment.filters["tojson"]
    expected = plain.from_string(source).render(
        messages=messages, add_generation_prompt=True, tools=None, **tokens
    )
    assert template.render(messages) == expected


def test_what_transformers_gives_to_templates_is_there() -> None:
    source = (
        "{% generation %}{{ strftime_now('%Y') }}{% endgeneration %}{{ tools is none }}"
        "{{ ['é<', messages[0]] | tojson }}"
    )
    year = datetime.now().year
    assert compiled(source, {}).render(_CHAT[:1]) == (
        f'{year}True["é<", {{"role": "system", "content": "Be brief."}}]'
    )


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("{% for", "is no template: TemplateSyntaxError"),
        ("{{ 'a' | nothing }}", "No filter named 'nothing'"),
        ("x" * (MOST_CHARACTERS + 1), "characters, the limit is"),
        ("{{ (" * 3000, "is no template"),
    ],
)
def test_what_is_no_template_is_refused(source: str, named: str) -> None:
    with pytest.raises(ChatTemplateError, match=named):
        compiled(source, {})


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("{{ raise_exception('no system role') }}", "refuses them: no system role"),
        ("{{ messages[9].role.x }}", "fails on them: UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ self.__init__.__globals__ }}", "SecurityError|UndefinedError"),
        ("{{ lipsum(n=1000000) }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_what_a_template_may_not_do_is_an_error_of_its_messages(source: str, named: str) -> None:
    with pytest.raises(ChatTemplateError, match=named):
        compiled(source, {}).render(_CHAT)


_SET = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = MORE %}{% endfor %}"


def _growing(start: str, more: str) -> str:
    return _SET.replace("START", start).replace("MORE", more) + "{{ ns.x }}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(99) %}" + "{% for a in r %}" * 4 + "{% endfor %}" * 4,
        "{% set a = 'a' * 400000 %}{{ (A)[0] }}".replace("A", " ~ ".join(["a"] * 500)),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{{ range(10**9) | list }}",
        "{{ 'a' * 1000000000 }}",
        "{{ [1] * 1000000000 }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        _growing("'aaaa'", "ns.x + ns.x"),
        _growing("'aaaa'", "ns.x ~ ns.x"),
        _growing("[1]", "[ns.x, ns.x]"),
        _growing("[1]", "(ns.x, ns.x)"),
        _growing("[1]", "{'a': ns.x, 'b': ns.x}"),
        _growing("9", "ns.x * ns.x"),
        _growing("'aaaa'", "ns.x.replace('a', ns.x)"),
        "{{ 'a'.center(1000000000) }}",
        "{{ 'a'.ljust(width=1000000000) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=999999999) }}",
        "{{ ('a' * 900000) | replace('a', 'b' * 900000) }}",
        "{{ range(99999) | join('a' * 100000) }}",
        "{{ ('a' * 100000).join('b' * 100000) }}",
        "{{ ('\n' * 500000) | indent(1000) }}",
        "{{ messages | tojson(indent=1000000) }}",
        "{{ [1, 2] | slice(1000000000) | list }}",
    ],
)
def test_a_template_that_loops_or_explodes_ends_within_seconds_and_little_memory(
    source: str,
) -> None:
    began = time.thread_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ChatTemplateError):
        compiled(source, {}).render(_CHAT)
    assert time.thread_time() - began < 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_a_long_conversation_is_no_loop() -> None:
    messages = [{"role": "user", "content": "word " * 200}, _CHAT[2]] * 300
    for source in (_CHATML, _LLAMA_2):
        text = compiled(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(messages)
        assert text.count("word") == 200 * 300
