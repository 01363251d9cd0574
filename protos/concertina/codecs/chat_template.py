"""Turns messages into the text of a prompt by a model's chat template, as transformers does.

A template is a program in Jinja. It runs in Jinja's sandbox and within a budget: of time, and of
characters and items that it makes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from concertina.codecs.chat_sandbox import Budget, Sandbox, TemplateSpent

TEMPLATE: Final = "chat_template.jinja"
"""The file of a bundle that turns messages into text."""

MOST_CHARACTERS: Final = 1 << 17
"""Characters of the largest template that is compiled, which takes seconds and 400 MB then."""


class ChatTemplateError(Exception):
    """A template that cannot be used, or messages that it refuses. The message says why."""


class HarmfulTemplateError(ChatTemplateError):
    """A template that reaches for what it must not have, loops, or makes too much."""


class _Refused(TemplateError):
    """The template has called raise_exception."""


class _Generation(Extension):
    """`{% generation %}`, with which templates mark what a model has said, changes nothing."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)  # what is set within is not known behind it


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled template. tokens: special tokens that it may name, such as `bos_token`."""

    template: Template = field(repr=False)
    tokens: Mapping[str, str]

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation.

        messages: the role and the content of each. add_generation_prompt: whether it ends where the
        model's answer begins, as a prompt does. Raises ChatTemplateError.
        """
        size = sum(len(value) for message in messages for value in message.values())
        budget, parts = Budget.of(size), list[str]()
        values = {
            **self.tokens,
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with budget:
                for part in self.template.generate(values):
                    budget.spend(len(part))
                    parts.append(part)
        except _Refused as error:
            raise ChatTemplateError(f"the chat template refuses them: {error}"[:500]) from None
        except TemplateSpent as error:
            raise HarmfulTemplateError(f"the chat template {error}") from None
        except SecurityError as error:
            reason = f"SecurityError: {error}"[:200]
            raise HarmfulTemplateError(f"the chat template fails on them: {reason}") from None
        except Exception as error:  # a template may raise whatever Python does
            reason = f"{type(error).__name__}: {error}"[:200]
            raise ChatTemplateError(f"the chat template fails on them: {reason}") from None
        return "".join(parts)


def compiled(source: str, tokens: Mapping[str, str]) -> ChatTemplate:
    """The template with this source. Raises ChatTemplateError."""
    if len(source) > MOST_CHARACTERS:
        raise ChatTemplateError(f"has {len(source):,} characters, the limit is {MOST_CHARACTERS:,}")
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = _raise
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    sandbox.guard_filters()
    try:
        return ChatTemplate(sandbox.from_string(source), tokens)
    except (TemplateError, RecursionError, SyntaxError, MemoryError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise ChatTemplateError(f"is no template: {reason}") from None


def _raise(message: str) -> None:
    raise _Refused(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As JSON, without the escapes that Jinja's own filter makes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
