"""What is asked for in a body, in the words of our client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from concertina.client import GenerateParameters
from concertina.client.requests import PromptLike
from concertina.shown import shown
from server.http.errors import invalid
from server.http.reading.fields import (
    Body,
    boolean,
    integer,
    integers,
    is_ids,
    number,
    table,
    text,
    texts,
)
from server.http.reading.refusals import require_supported
from server.http.reading.structure import Structure, structure

_LEGACY_TOKENS: Final = 16  # OpenAI's default of /v1/completions
_MOST_PROMPTS: Final = 2048  # OpenAI's limit
_MOST_LOGPROBS: Final = 20
_SEEDS: Final = 2**64
_OFF: Final = (-1, 0)  # vLLM's two ways to write top_k that keeps all


@dataclass(frozen=True)
class Wanted:
    """A request to generate.

    prompts: one stream with n outputs for each; None starts from nothing.
    logprobs: most likely tokens to report with each token; None reports none.
    echo: whether the output begins with the prompt.
    max_tokens: None for the server's default; 0 generates nothing.
    structure: what each output must be, which is among the parameters, too.
    """

    model: str
    prompts: tuple[PromptLike | None, ...]
    parameters: GenerateParameters
    n: int = 1
    logprobs: int | None = None
    echo: bool = False
    max_tokens: int | None = None
    stream: bool = False
    include_usage: bool = False
    keep: float | None = None
    structure: Structure | None = None


def wanted_completion(body: Body) -> Wanted:
    """The request in a body of /v1/completions. Raises HttpError."""
    require_supported(body)
    logprobs = _count(body, "logprobs", _MOST_LOGPROBS)
    max_tokens = integer(body, "max_tokens")
    echo = bool(boolean(body, "echo"))
    if max_tokens == 0 and not echo:
        raise invalid("max_tokens", "max_tokens is 0: it must be at least 1, or `echo` true")
    return _wanted(
        body,
        prompts=_prompts(body),
        logprobs=logprobs,
        echo=echo,
        max_tokens=_LEGACY_TOKENS if max_tokens is None else max_tokens,
    )


def wanted_chat(body: Body) -> Wanted:
    """The request in a body of /v1/chat/completions. Raises HttpError."""
    require_supported(body)
    if boolean(body, "echo"):
        raise invalid("echo", "echo is true: it works in /v1/completions only")
    asked, top = boolean(body, "logprobs"), _count(body, "top_logprobs", _MOST_LOGPROBS)
    if top is not None and not asked:
        raise invalid("top_logprobs", f"top_logprobs is {top}: it needs `logprobs` true")
    newer, older = integer(body, "max_completion_tokens"), integer(body, "max_tokens")
    if newer is not None and older is not None and newer != older:
        raise invalid(
            "max_tokens", f"max_tokens is {older}, and max_completion_tokens {newer}: give one"
        )
    limit = older if newer is None else newer
    if limit == 0:
        name = "max_tokens" if newer is None else "max_completion_tokens"
        raise invalid(name, f"{name} is 0: it must be at least 1")
    return _wanted(
        body,
        prompts=(messages(body),),
        logprobs=(top or 0) if asked else None,
        max_tokens=limit,
    )


def _wanted(
    body: Body,
    *,
    prompts: tuple[PromptLike | None, ...],
    logprobs: int | None,
    max_tokens: int | None,
    echo: bool = False,
) -> Wanted:
    n = integer(body, "n")
    best_of = integer(body, "best_of")
    if best_of is not None and best_of != (n or 1):
        raise invalid("best_of", f"best_of is {best_of}: it must be n, or left out")
    stream = bool(boolean(body, "stream"))
    options = table(body, "stream_options") or {}
    if options and not stream:
        raise invalid("stream_options", "stream_options needs `stream` true")
    priority = integer(body, "priority")
    asked = structure(body)
    parameters = GenerateParameters(
        temperature=number(body, "temperature"),
        top_k=_top_k(body),
        top_p=number(body, "top_p"),
        min_p=number(body, "min_p"),
        typical_p=number(body, "typical_p"),
        repetition_penalty=number(body, "repetition_penalty"),
        presence_penalty=number(body, "presence_penalty"),
        frequency_penalty=number(body, "frequency_penalty"),
        logit_bias=_biases(body),
        allowed_token_ids=integers(body, "allowed_token_ids"),
        bad_words=texts(body, "bad_words"),
        seed=seed(body),
        min_tokens=integer(body, "min_tokens"),
        stop=texts(body, "stop"),
        stop_token_ids=integers(body, "stop_token_ids"),
        include_stop=boolean(body, "include_stop_str_in_output"),
        ignore_eos=boolean(body, "ignore_eos"),
        time_limit=number(body, "time_limit"),
        # In vLLM the lower goes first.
        priority=None if priority is None else -priority,
        stream_interval=integer(body, "stream_interval"),
        label=text(body, "label"),
        n=n,
    )
    if asked is not None:
        parameters.update(asked.parameters)
    return Wanted(
        model=text(body, "model") or "",
        prompts=prompts,
        parameters=parameters,
        n=1 if n is None else n,
        logprobs=logprobs,
        echo=echo,
        max_tokens=max_tokens,
        stream=stream,
        include_usage=bool(boolean(options, "include_usage")),
        keep=number(body, "keep"),
        structure=asked,
    )


def _count(body: Body, name: str, most: int) -> int | None:
    value = integer(body, name)
    if value is not None and not 0 <= value <= most:
        raise invalid(name, f"{name} is {value}: it must be between 0 and {most}")
    return value


def _top_k(body: Body) -> int | None:
    value = integer(body, "top_k")
    return 0 if value in _OFF else value


def seed(body: Body) -> int | None:
    """The seed, of which OpenAI's and vLLM's may be negative. Raises HttpError."""
    value = integer(body, "seed")
    if value is not None and not -(_SEEDS // 2) <= value < _SEEDS:
        raise invalid("seed", f"seed is {shown(value)}: it must have at most 64 bits")
    return None if value is None else value % _SEEDS


def _biases(body: Body) -> dict[int, float] | None:
    given = table(body, "logit_bias")
    if not given:
        return None
    biases = {}
    for name, value in given.items():
        if not (name.isascii() and name.isdecimal() and len(name) <= len(str(_SEEDS))):
            raise invalid("logit_bias", f"logit_bias has {shown(name)}: it must be a token id")
        biases[int(name)] = number({"logit_bias": value}, "logit_bias") or 0.0
    return biases


def _prompts(body: Body) -> tuple[PromptLike | None, ...]:
    """The prompts in one of four forms: a text, token ids, or a list of one of these."""
    given = body.get("prompt")
    if given is None or isinstance(given, str):
        return (given or None,)
    if isinstance(given, list) and given:
        if is_ids(given):
            return (given,)
        if len(given) > _MOST_PROMPTS:
            raise invalid(
                "prompt", f"prompt has {len(given):,} items, the limit is {_MOST_PROMPTS:,}"
            )
        if all(isinstance(each, str) for each in given) or all(map(is_ids, given)):
            return tuple(each or None for each in given)
    raise invalid(
        "prompt",
        f"prompt is {shown(given)}: it must be a text, a list of token ids, or a list of these",
    )


def messages(body: Body) -> list[Mapping[str, str]]:
    """The messages of a conversation, each with a role and a text. Raises HttpError."""
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise invalid("messages", f"messages is {shown(given)}: it must be a list of messages")
    return [_message(each, f"messages[{index}]") for index, each in enumerate(given)]


def _message(given: object, name: str) -> Mapping[str, str]:
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise invalid("messages", f"{name} is {shown(given)}: it needs a role and content")
    for calls in ("tool_calls", "function_call", "tool_call_id", "audio"):
        if given.get(calls):
            raise invalid("messages", f"{name}.{calls} is given: only text is understood here")
    content = given.get("content")
    if isinstance(content, list):
        content = "".join(_part(each, f"{name}.content[{at}]") for at, each in enumerate(content))
    if not isinstance(content, str):
        raise invalid("messages", f"{name}.content is {shown(content)}: it must be a text")
    return {"role": given["role"], "content": content}


def _part(given: object, name: str) -> str:
    if isinstance(given, dict) and given.get("type") == "text":
        words = given.get("text")
        if isinstance(words, str):
            return words
    raise invalid("messages", f"{name} is {shown(given)}: only parts of text are understood here")
