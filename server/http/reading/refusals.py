"""What OpenAI's API, or a server like it, has and this one has not: refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from concertina.shown import shown
from server.http.errors import HttpError, invalid
from server.http.reading.fields import Body

NOT_HERE: Final = (
    "/v1/responses",
    "/v1/responses/{rest:path}",
    "/v1/embeddings",
    "/v1/audio/{rest:path}",
    "/v1/images/edits",
    "/v1/images/variations",
    "/v1/moderations",
    "/v1/files",
    "/v1/files/{rest:path}",
    "/v1/batches",
    "/v1/batches/{rest:path}",
    "/v1/fine_tuning/{rest:path}",
    "/v1/assistants",
    "/v1/threads",
    "/v1/realtime",
    "/v1/messages",
    "/v1/rerank",
    "/v1/score",
    "/v1/completions/render",
)
"""Paths of OpenAI's API and of vLLM's that do not exist here."""

_STRUCTURE: Final = "is another server's way to ask for a structure: use `structured_outputs`"
_TOOLS: Final = "lets the model call tools, which this server does not offer"
_CHANGES: Final = "changes what is generated in a way that this server cannot"

# Fields that would change the answer, why each is refused, and the values that change nothing.
_REFUSED: Final[Mapping[str, tuple[str, tuple[Any, ...]]]] = {
    "guided_whitespace_pattern": (_STRUCTURE, ()),
    "structural_tag": (_STRUCTURE, ()),
    "grammar": (_STRUCTURE, ("",)),
    "json_schema": (_STRUCTURE, ({},)),
    "regex": (_STRUCTURE, ("",)),
    "ebnf": (_STRUCTURE, ("",)),
    "tools": (_TOOLS, ([],)),
    "tool_choice": (_TOOLS, ("none", "auto")),
    "functions": (_TOOLS, ([],)),
    "function_call": (_TOOLS, ("none", "auto")),
    "web_search_options": (_TOOLS, ()),
    "suffix": ("asks for a text between two others, which this server cannot write", ("",)),
    "use_beam_search": (_CHANGES, (False,)),
    "length_penalty": (_CHANGES, (1,)),
    "early_stopping": (_CHANGES, (False,)),
    "no_repeat_ngram_size": (_CHANGES, (0,)),
    "logits_processors": (_CHANGES, ([],)),
    "prompt_embeds": (_CHANGES, ()),
    "truncate_prompt_tokens": ("shortens the prompt, which this server never does", ()),
    "prompt_logprobs": ("is not offered here: use `echo` with `logprobs`", (False,)),
    "add_special_tokens": ("takes the model's own first token away", (True,)),
    "skip_special_tokens": ("asks for the text of special tokens, which have none here", (True,)),
    "audio": ("asks for sound, and models here write text", ()),
    "modalities": ("asks for more than text", (["text"],)),
    "reasoning_effort": (_CHANGES, ("none",)),
    "verbosity": (_CHANGES, ("medium",)),
    "chat_template": ("replaces the model's own: serve with --chat-template FILE", ()),
    "chat_template_kwargs": (_CHANGES, ({},)),
    "documents": (_CHANGES, ([],)),
    "add_generation_prompt": ("leaves out the beginning of the answer", (True,)),
    "continue_final_message": ("continues a message, which this server cannot", (False,)),
    "thinking": (_CHANGES, ()),
    "dry_multiplier": (_CHANGES, (0,)),
    "xtc_probability": (_CHANGES, (0,)),
    "top_n_sigma": (_CHANGES, (-1, 0)),
    "top_a": (_CHANGES, (0,)),
    "tfs_z": (_CHANGES, (1,)),
    "mirostat": (_CHANGES, (0,)),
    "mirostat_mode": (_CHANGES, (0,)),
    "dynatemp_range": (_CHANGES, (0,)),
    "repeat_penalty": ("is called `repetition_penalty` here", (1,)),
}


def require_supported(body: Body) -> None:
    """Raise HttpError for the first field that would change the answer and is not supported."""
    for name, value in body.items():
        if name not in _REFUSED or value is None:
            continue
        reason, neutral = _REFUSED[name]
        if not any(type(value) is type(each) and value == each for each in neutral) and not (
            _is_number(value) and any(_is_number(each) and value == each for each in neutral)
        ):
            raise invalid(
                name, f"{name} is {shown(value)}: it {reason}; leave it out", "unsupported"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def not_here(path: str) -> HttpError:
    """The error for a path that OpenAI's API has and this server has not."""
    return HttpError(
        404,
        f"{path} is not offered here: use /v1/chat/completions or /v1/completions",
        code="unsupported",
    )
