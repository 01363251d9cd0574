"""POST /v1/images/generations."""

from __future__ import annotations

import asyncio
import base64
import time
from contextlib import aclosing
from typing import Any, Final

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from concertina.client import AsyncClient, GenerateParameters, Model
from concertina.client.pictures import png_of_array
from concertina.shown import listed, shown
from server.http.errors import HttpError, invalid
from server.http.reading.fields import Body, boolean, integer, number, read_body, text
from server.http.reading.parameters import seed
from server.http.reading.structure import refuse_structure
from server.http.runs import Began, Piece, of_stream
from server.http.upstream import CALL_SECONDS, Upstream
from server.http.writing.sse import unless_gone

_MOST_IMAGES: Final = 10  # OpenAI's limit


async def generations(request: Request) -> Response:
    """Images whose label is the prompt."""
    upstream: Upstream = request.app.state.upstream
    body = await read_body(request, upstream.settings)
    return JSONResponse(await unless_gone(request, _images(request, upstream, body)))


async def _images(request: Request, upstream: Upstream, body: Body) -> dict[str, Any]:
    _require_supported(body)
    with upstream.calling(request) as client:
        model = await _model(client, text(body, "model") or "")
        assert model.image is not None
        width, height = model.image.width, model.image.height
        size = text(body, "size")
        if size not in (None, "", "auto", f"{width}x{height}"):
            raise invalid("size", f"size is {shown(size)}: {model.name} makes {width}x{height}")
        stream = client.generate(**_parameters(body, model))
        pixels = dict[int, bytearray]()
        async with aclosing(of_stream(stream, kept=False)) as arriving:
            async for update in arriving:
                if isinstance(update, Began):
                    pixels = {each: bytearray() for each in range(update.accepted.output.n)}
                elif isinstance(update, Piece):
                    pixels[update.index] += update.rgb
    made = [
        await asyncio.to_thread(_encoded, bytes(each), width, height) for each in pixels.values()
    ]
    return {
        "created": int(time.time()),
        "data": [{"b64_json": each} for each in made],
        "output_format": "png",
        "size": f"{width}x{height}",
    }


async def _model(client: AsyncClient, name: str) -> Model:
    """The image model with this name; without one, the only one. Raises HttpError."""
    served = [
        each
        for each in await client.models(timeout=CALL_SECONDS)
        if (each.name == name if name else each.image is not None)
    ]
    if name and not served:
        served = [await client.model(name, timeout=CALL_SECONDS)]  # says which there are
    if len(served) != 1:
        names = listed(each.name for each in served) or "none"
        raise HttpError(
            404,
            f"model is empty, and the models that make images here are: {names}",
            param="model",
            code="model_not_found",
        )
    if served[0].image is None:
        raise invalid("model", f"{name} makes text: use /v1/completions")
    return served[0]


def _require_supported(body: Body) -> None:
    refuse_structure(body)
    form = body.get("response_format")
    if form not in (None, "b64_json"):
        raise invalid(
            "response_format", f"response_format is {shown(form)}: only b64_json is offered"
        )
    kind = body.get("output_format")
    if kind not in (None, "png"):
        raise invalid("output_format", f"output_format is {shown(kind)}: only png is offered")
    if boolean(body, "stream"):
        raise invalid("stream", "stream is true: images are answered whole")
    background = body.get("background")
    if background not in (None, "auto", "opaque"):
        raise invalid("background", f"background is {shown(background)}: images are opaque")


def _parameters(body: Body, model: Model) -> GenerateParameters:
    n = integer(body, "n")
    if n is not None and not 1 <= n <= _MOST_IMAGES:
        raise invalid("n", f"n is {n}: it must be between 1 and {_MOST_IMAGES}")
    label = text(body, "prompt") or None
    if label is not None and label not in model.labels:
        names = listed(map(repr, model.labels)) or "none, so leave it out"
        raise invalid(
            "prompt", f"prompt is {shown(label)}: {model.name} knows these words only: {names}"
        )
    top_k = integer(body, "top_k")
    return GenerateParameters(
        model=model.name,
        label=label,
        n=n,
        seed=seed(body),
        temperature=number(body, "temperature"),
        top_k=0 if top_k == -1 else top_k,
        top_p=number(body, "top_p"),
        min_p=number(body, "min_p"),
    )


def _encoded(rgb: bytes, width: int, height: int) -> str:
    """The pixels as a PNG, in base64."""
    pixels = np.frombuffer(rgb, np.uint8).reshape(height, width, 3)
    return base64.b64encode(png_of_array(pixels)).decode()
