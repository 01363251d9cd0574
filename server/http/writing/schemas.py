"""JSON Schemas of what is answered."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

Schema: TypeAlias = dict[str, Any]

_TEXT: Final = {"type": "string"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_MAYBE_TEXT: Final = {"type": ["string", "null"]}
_MAYBE_OBJECT: Final = {"type": ["object", "null"]}


def _object(**properties: Schema) -> Schema:
    """An object that has all of these."""
    return {"type": "object", "required": [*properties], "properties": properties}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _answer(name: str, **choice: Schema) -> Schema:
    ends: dict[str, Schema] = {
        "index": _COUNT,
        "logprobs": _MAYBE_OBJECT,
        "finish_reason": {"enum": ["stop", "length"]},
        "stop_reason": {"type": ["string", "integer", "null"]},
    }
    return _object(
        id=_TEXT,
        object={"const": name},
        created=_COUNT,
        model=_TEXT,
        system_fingerprint=_TEXT,
        choices=_list(_object(**choice, **ends)),
        usage=_object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT),
    )


_MODEL: Final = _object(
    id=_TEXT,
    object={"const": "model"},
    created=_COUNT,
    owned_by=_TEXT,
    max_model_len=_COUNT,
    modality=_TEXT,
    vocabulary=_COUNT,
    labels=_list(_TEXT),
    image_size=_MAYBE_TEXT,
    version=_TEXT,
    fingerprint=_TEXT,
)
_MESSAGE: Final = _object(role={"const": "assistant"}, content=_TEXT)

ERROR: Final = _object(
    error=_object(message=_TEXT, type=_TEXT, param=_MAYBE_TEXT, code=_MAYBE_TEXT)
)
DELETED: Final = _object(id=_TEXT, object={"const": "stream"}, deleted={"const": True})
ANSWERS: Final[dict[str, Schema]] = {
    "/v1/models": _object(object={"const": "list"}, data=_list(_MODEL)),
    "/v1/models/{model}": _MODEL,
    "/v1/completions": _answer("text_completion", text=_TEXT),
    "/v1/chat/completions": _answer("chat.completion", message=_MESSAGE),
    "/v1/images/generations": _object(
        created=_COUNT,
        data=_list(_object(b64_json=_TEXT)),
        output_format={"const": "png"},
        size=_TEXT,
    ),
    "/tokenize": _object(
        count=_COUNT,
        max_model_len=_COUNT,
        tokens=_list(_COUNT),
        token_strs={"type": ["array", "null"], "items": _TEXT},
    ),
    "/detokenize": _object(prompt=_TEXT),
    "/tokenizer_info": _object(
        tokenizer_class=_TEXT,
        bos_token=_MAYBE_TEXT,
        eos_token=_MAYBE_TEXT,
        pad_token=_MAYBE_TEXT,
        model_max_length=_COUNT,
        chat_template=_MAYBE_TEXT,
    ),
    "/health": _object(status={"const": "ok"}),
    "/version": _object(version=_TEXT),
}
"""What is answered at each path that answers with JSON."""
