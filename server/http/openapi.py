"""The OpenAPI document of the gateway."""

from __future__ import annotations

from typing import Any, Final

from concertina import __version__
from server.http.reading.schemas import BODIES
from server.http.writing.schemas import ANSWERS, DELETED, ERROR, Schema

_STREAM: Final = "/v1/streams/{stream_id}"
_MODEL_IN: Final = {"/v1/models/{model}": ("path",), "/tokenizer_info": ("query",)}
_EVENT: Final = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "id": {"type": "string"}},
}
_EVENTS: Final = {"text/event-stream": {"schema": _EVENT}}
_PAGE: Final = {"text/plain": {"schema": {"type": "string"}}}


def document() -> dict[str, Any]:
    """What the gateway answers, in OpenAPI 3.1."""
    stream_id = _parameter("stream_id", "path")
    paths = {
        "/metrics": {"get": _operation("/metrics", _PAGE)},
        "/openapi.json": {"get": _operation("/openapi.json", _json({"type": "object"}))},
        _STREAM: {
            "get": _operation(
                _STREAM,
                _EVENTS,
                stream_id,
                _parameter("after"),
                _parameter("Last-Event-ID", "header"),
            ),
            "delete": _operation("delete a stream", _json(DELETED), stream_id),
        },
    }
    for path, answer in ANSWERS.items():
        content = _json(answer)
        if path not in BODIES:
            parameters = [_parameter("model", place) for place in _MODEL_IN.get(path, ())]
            paths[path] = {"get": _operation(path, content, *parameters)}
            continue
        if path.endswith("completions"):
            content |= _EVENTS
        body = {"required": True, "content": _json(BODIES[path])}
        paths[path] = {"post": {**_operation(path, content), "requestBody": body}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Concertina", "version": __version__},
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
        "paths": paths,
    }


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _parameter(name: str, place: str = "query") -> dict[str, Any]:
    return {
        "name": name,
        "in": place,
        "required": place == "path",
        "schema": {"type": "string"},
    }


def _operation(name: str, content: dict[str, Any], *parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "summary": name.removeprefix("/"),
        "parameters": [*parameters],
        "responses": {
            "200": {"description": "The answer; of a stream, its events.", "content": content},
            "default": {
                "description": "The call is refused, or has failed.",
                "content": _json(ERROR),
            },
        },
    }
