"""The OpenAPI document of the gateway."""

from __future__ import annotations

from typing import Any, Final

from concertina import __version__

_TEXT: Final = {"type": "string"}
_NUMBER: Final = {"type": "number"}
_COUNT: Final = {"type": "integer"}
_YES: Final = {"type": "boolean"}
_IDS: Final = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_WORDS: Final = {"oneOf": [_TEXT, {"type": "array", "items": _TEXT}]}
_SCHEMA: Final = {"type": "object"}
_STRUCTURE: Final = {
    "json": {"oneOf": [_TEXT, _SCHEMA]},
    "json_object": _YES,
    "regex": _TEXT,
    "choice": {"type": "array", "items": _TEXT, "minItems": 1},
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
    "n": {"type": "integer", "minimum": 1, "maximum": 128},
    "stream": _YES,
    "stream_options": {"type": "object", "properties": {"include_usage": _YES}},
    "max_tokens": _COUNT,
    "min_tokens": _COUNT,
    "temperature": {"type": "number", "minimum": 0},
    "top_k": {"type": "integer", "minimum": -1},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "typical_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "logit_bias": {"type": "object", "additionalProperties": _NUMBER},
    "allowed_token_ids": _IDS,
    "bad_words": _WORDS,
    "seed": _COUNT,
    "stop": _WORDS,
    "stop_token_ids": _IDS,
    "include_stop_str_in_output": _YES,
    "ignore_eos": _YES,
    "time_limit": {"type": "number", "exclusiveMinimum": 0},
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
_PROMPT: Final = {
    "oneOf": [_TEXT, _IDS, {"type": "array", "items": _TEXT}, {"type": "array", "items": _IDS}]
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
        "content": {"oneOf": [_TEXT, {"type": "array", "items": _PART}]},
    },
}
_MESSAGES: Final = {"type": "array", "minItems": 1, "maxItems": 128, "items": _MESSAGE}
_LOGPROBS: Final = {"type": "integer", "minimum": 0, "maximum": 20}

_BODIES: Final[dict[str, dict[str, Any]]] = {
    "/v1/completions": {
        "properties": {**_COMMON, "prompt": _PROMPT, "echo": _YES, "logprobs": _LOGPROBS}
    },
    "/v1/chat/completions": {
        "required": ["messages"],
        "properties": {
            **_COMMON,
            "messages": _MESSAGES,
            "max_completion_tokens": _COUNT,
            "logprobs": _YES,
            "top_logprobs": _LOGPROBS,
        },
    },
    "/v1/images/generations": {
        "properties": {
            "model": _TEXT,
            "prompt": _TEXT,
            "n": {"type": "integer", "minimum": 1, "maximum": 10},
            "size": _TEXT,
            "response_format": {"const": "b64_json"},
            "seed": _COUNT,
            "temperature": {"type": "number", "minimum": 0},
        }
    },
    "/tokenize": {
        "properties": {
            "model": _TEXT,
            "prompt": _TEXT,
            "messages": _MESSAGES,
            "return_token_strs": _YES,
        }
    },
    "/detokenize": {
        "required": ["tokens"],
        "properties": {"model": _TEXT, "tokens": _IDS},
    },
}
_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REFUSED: Final = {
    "description": "The call is refused, or has failed.",
    "content": {"application/json": {"schema": _ERROR}},
}
_JSON: Final = {"application/json": {"schema": {"type": "object"}}}
_GOOD: Final = {"description": "The answer.", "content": _JSON}
_EVENTS: Final = {
    "description": "The answer, or with `stream` its events.",
    "content": {**_JSON, "text/event-stream": {"schema": _TEXT}},
}
_GETS: Final[dict[str, tuple[str, ...]]] = {
    "/v1/models": (),
    "/v1/models/{model}": ("model",),
    "/v1/streams/{stream_id}": ("stream_id",),
    "/health": (),
    "/version": (),
}


def document() -> dict[str, Any]:
    """What the gateway answers, in OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    for path, names in _GETS.items():
        paths[path] = {
            "get": _operation(path, _EVENTS if names == ("stream_id",) else _GOOD, names)
        }
    paths["/v1/streams/{stream_id}"]["delete"] = _operation("delete stream", _GOOD, ("stream_id",))
    for path, body in _BODIES.items():
        operation = _operation(path, _EVENTS if path.endswith("completions") else _GOOD, ())
        content = {"application/json": {"schema": {"type": "object", **body}}}
        operation["requestBody"] = {"required": True, "content": content}
        paths[path] = {"post": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Concertina", "version": __version__},
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
        "paths": paths,
    }


def _operation(name: str, good: dict[str, Any], parameters: tuple[str, ...]) -> dict[str, Any]:
    return {
        "summary": name.removeprefix("/"),
        "parameters": [
            {"name": each, "in": "path", "required": True, "schema": _TEXT} for each in parameters
        ],
        "responses": {"200": good, "default": _REFUSED},
    }
