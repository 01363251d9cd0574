"""What the page has to know of the models: what they take, and what their state is made of."""

from __future__ import annotations

from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from concertina import __version__
from concertina.client import AsyncClient, InvalidRequest, Model
from server.http.upstream import CALL_SECONDS, Upstream

_PROBE: Final = ({"role": "user", "content": "a"},)


async def models(request: Request) -> Response:
    """GET /c/models."""
    upstream: Upstream = request.app.state.upstream
    with upstream.calling(request) as client:
        served = await client.models(timeout=CALL_SECONDS)
        found = [_model(each, await _chats(client, each)) for each in served]
    chaos = request.app.state.chaos is not None
    return JSONResponse({"version": __version__, "models": found, "chaos": chaos})


async def _chats(client: AsyncClient, model: Model) -> bool:
    """Whether messages become text: the bundle, or the server, has a template."""
    if model.modality != "text":
        return False
    try:
        await client.tokenize(_PROBE, model=model.name, timeout=CALL_SECONDS)
    except InvalidRequest:
        return False
    return True


def _model(model: Model, chats: bool) -> dict[str, Any]:
    image, fold = model.image, model.fold
    stacks: dict[int, dict[str, int]] = {}
    for tensor in model.tensors:
        if tensor.kind == "stack":
            group = stacks.setdefault(
                tensor.kept, {"kept": tensor.kept, "tensors": 0, "entry_bytes": 0}
            )
            group["tensors"] += 1
            group["entry_bytes"] += tensor.unit_bytes
    return {
        "name": model.name,
        "modality": model.modality,
        "context": model.context,
        "labels": model.labels,
        "image": image and {"width": image.width, "height": image.height},
        "attention": model.attention,
        "parameters": model.parameters,
        "metrics": model.metrics,
        "weights": model.weights,
        "state": model.state,
        "slots": model.slots,
        "max_state_bytes": model.max_state_bytes,
        "chats": chats,
        "stacks": [*stacks.values()],
        "row_bytes": _bytes(model, "history"),
        "fixed_bytes": _bytes(model, "recurrent"),
        "fold": fold
        and {
            "span": fold.span,
            "binary": fold.binary,
            "keep_first": fold.keep_first,
            "keep_newest": fold.keep_newest,
        },
    }


def _bytes(model: Model, kind: str) -> int:
    return sum(tensor.unit_bytes for tensor in model.tensors if tensor.kind == kind)
