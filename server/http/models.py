"""The endpoints that generate nothing: models, tokens, health."""

from __future__ import annotations

import time
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from concertina import __version__
from concertina.client import InvalidRequest, Model
from concertina.shown import shown
from server.http.errors import HttpError, invalid
from server.http.reading.fields import boolean, integers, read_body, text
from server.http.reading.parameters import messages
from server.http.upstream import CALL_SECONDS, Upstream
from server.http.writing.vocabulary import START_NAME

_STARTED: Final = int(time.time())


async def list_models(request: Request) -> Response:
    """GET /v1/models."""
    upstream: Upstream = request.app.state.upstream
    with upstream.calling(request) as client:
        served = await client.models(timeout=CALL_SECONDS)
    return JSONResponse({"object": "list", "data": [_model(each) for each in served]})


async def get_model(request: Request) -> Response:
    """GET /v1/models/{id}."""
    upstream: Upstream = request.app.state.upstream
    with upstream.calling(request) as client:
        found = await client.model(request.path_params["model"], timeout=CALL_SECONDS)
    return JSONResponse(_model(found))


def _model(model: Model) -> dict[str, Any]:
    size = model.image and f"{model.image.width}x{model.image.height}"
    return {
        "id": model.name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "concertina",
        "root": model.name,
        "parent": None,
        "max_model_len": model.context,
        "modality": model.modality,
        "vocabulary": model.vocabulary,
        "labels": list(model.labels),
        "image_size": size,
        "version": model.version,
        "fingerprint": model.fingerprint,
    }


async def tokenize(request: Request) -> Response:
    """POST /tokenize, as vLLM has it."""
    upstream: Upstream = request.app.state.upstream
    body = await read_body(request, upstream.settings)
    name, with_strings = text(body, "model") or "", boolean(body, "return_token_strs")
    prompt = body.get("prompt")
    if body.get("messages") is not None:
        prompt = messages(body)
    elif not isinstance(prompt, str):
        raise invalid("prompt", f"prompt is {shown(prompt)}: it must be a text, or give messages")
    with upstream.calling(request) as client:
        model = await upstream.model(client, name)
        ids: list[int] = []
        pieces: list[str] = []
        if prompt == START_NAME and not model.has_tokenizer:
            ids, pieces = [model.vocabulary], [START_NAME]
        elif prompt:
            told = await client.tokenize(prompt, model=name, timeout=CALL_SECONDS)
            ids, pieces = [*told.ids], [each.decode(errors="replace") for each in told.pieces]
    return JSONResponse(
        {
            "count": len(ids),
            "max_model_len": model.context,
            "tokens": ids,
            "token_strs": pieces if with_strings else None,
        }
    )


async def detokenize(request: Request) -> Response:
    """POST /detokenize, as vLLM has it."""
    upstream: Upstream = request.app.state.upstream
    body = await read_body(request, upstream.settings)
    name, ids = text(body, "model") or "", integers(body, "tokens")
    if ids is None:
        raise invalid("tokens", "tokens is absent: give a list of token ids")
    with upstream.calling(request) as client:
        model = await upstream.model(client, name)
        begins = not model.has_tokenizer and ids[:1] == [model.vocabulary]
        rest = ids[1:] if begins else ids
        try:
            told = (
                (await client.detokenize(rest, model=name, timeout=CALL_SECONDS)).text
                if rest
                else ""
            )
        except InvalidRequest as error:
            raise invalid("tokens", str(error)) from None
    return JSONResponse({"prompt": START_NAME + told if begins else told})


async def tokenizer_info(request: Request) -> Response:
    """GET /tokenizer_info: what stands before every text, for programs that score texts."""
    upstream: Upstream = request.app.state.upstream
    with upstream.calling(request) as client:
        model = await upstream.model(client, request.query_params.get("model", ""))
    if model.has_tokenizer:
        raise HttpError(
            404,
            f"{model.name} has a tokenizer of its own: read its tokenizer.json",
            code="unsupported",
        )
    return JSONResponse(
        {
            "tokenizer_class": "Bytes",
            "bos_token": START_NAME,
            "eos_token": START_NAME,
            "pad_token": START_NAME,
            "model_max_length": model.context,
            "chat_template": None,
        }
    )


async def health(request: Request) -> Response:
    """GET /health: 200 if the server behind the gateway is well, else 503."""
    upstream: Upstream = request.app.state.upstream
    if await upstream.is_serving():
        return JSONResponse({"status": "ok"})
    raise HttpError(
        503, "the server behind this gateway does not answer", code="unavailable", retry_after=1.0
    )


async def version(_: Request) -> Response:
    """GET /version."""
    return JSONResponse({"version": __version__})
