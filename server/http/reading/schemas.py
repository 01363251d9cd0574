"""JSON Schemas of the bodies that are read."""

from __future__ import annotations

from typing import Any, Final

_TEXT: Final = {"type": "string"}
_YES: Final = {"type": "boolean"}
_ID: Final = {"type": "integer", "minimum": 0}
_SEED: Final = {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1}
_LOGPROBS: Final = {"type": "integer", "minimum": 0, "maximum": 20}


def _whole(lowest: int, highest: int = 2**32 - 1) -> dict[str, Any]:
    return {"type": "integer", "minimum": lowest, "maximum": highest}


def _list(item: dict[str, Any], least: int, most: int) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


def _words(most: int, longest: int) -> dict[str, Any]:
    """A text, or some of them."""
    word = {"type": "string", "minLength": 1, "maxLength": longest}
    return {"anyOf": [word, _list(word, 0, most)]}


_SCHEMA: Final = {"type": "object"}
_STRUCTURE: Final = {
    "json": {"anyOf": [_TEXT, _SCHEMA]},
    "json_object": _YES,
    "regex": _TEXT,
    "choice": _list({"type": "string", "minLength": 1, "maxLength": 1024}, 1, 1024),
    "grammar": _TEXT,
}
_FORMAT: Final = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": {"enum": ["text", "json_object", "json_schema"]},
        "json_schema": {
            "type": "object",
            "required": ["schema"],
            "properties": {
                "name": _TEXT,
                "description": _TEXT,
                "schema": _SCHEMA,
                "strict": {"type": ["boolean", "null"]},
            },
        },
    },
}

_COMMON: Final = {
    "model": _TEXT,
    "n": _whole(1, 128),
    "stream": _YES,
    "stream_options": {"type": "object", "properties": {"include_usage": _YES}},
    "min_tokens": _whole(0),
    "temperature": {"type": "number", "minimum": 0},
    "top_k": _whole(-1),
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "typical_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,20}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": 1024,
    },
    "allowed_token_ids": _list(_ID, 1, 262_144),
    "bad_words": _words(128, 64),
    "seed": _SEED,
    "stop": _words(16, 256),
    "stop_token_ids": _list(_ID, 0, 1024),
    "include_stop_str_in_output": _YES,
    "ignore_eos": _YES,
    "time_limit": {"type": "number", "exclusiveMinimum": 0, "maximum": 315_576_000_000},
    "stream_interval": _whole(1, 1_000_000),
    "label": _TEXT,
    "response_format": _FORMAT,
    "structured_outputs": {
        "type": "object",
        "properties": _STRUCTURE,
        "minProperties": 1,
        "maxProperties": 1,
    },
    **{f"guided_{kind}": schema for kind, schema in _STRUCTURE.items()},
    "priority": {"type": "integer", "minimum": -100, "maximum": 100},
    "keep": {"type": "number", "minimum": 0, "maximum": 86400},
}
_IDS: Final = _list(_ID, 0, 1_048_576)
_PROMPT: Final = {
    "anyOf": [_TEXT, {**_IDS, "minItems": 1}, _list(_TEXT, 1, 2048), _list(_IDS, 1, 2048)]
}
_PART: Final = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": _TEXT},
}
_MESSAGE: Final = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": _TEXT,
        "content": {"anyOf": [_TEXT, {"type": "array", "items": _PART}]},
    },
}
_MESSAGES: Final = _list(_MESSAGE, 1, 1024)


def _body(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """A body with these fields. An optional one may be null, which is the same as absent."""
    nullable = {name: {"anyOf": [each, {"type": "null"}]} for name, each in optional.items()}
    return {"type": "object", "required": [*required], "properties": required | nullable}


BODIES: Final[dict[str, dict[str, Any]]] = {
    "/v1/completions": _body(
        {}, **_COMMON, prompt=_PROMPT, max_tokens=_whole(0), echo=_YES, logprobs=_LOGPROBS
    ),
    "/v1/chat/completions": _body(
        {"messages": _MESSAGES},
        **_COMMON,
        max_tokens=_whole(1),
        max_completion_tokens=_whole(1),
        logprobs=_YES,
        top_logprobs=_LOGPROBS,
    ),
    "/v1/images/generations": _body(
        {},
        model=_TEXT,
        prompt=_TEXT,
        n=_whole(1, 10),
        size=_TEXT,
        response_format={"const": "b64_json"},
        seed=_SEED,
        temperature={"type": "number", "minimum": 0},
    ),
    "/tokenize": _body({}, model=_TEXT, prompt=_TEXT, messages=_MESSAGES, return_token_strs=_YES),
    "/detokenize": _body({"tokens": _IDS}, model=_TEXT),
}
"""What is read at each path that takes a body."""
