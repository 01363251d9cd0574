"""What a program learns of a refusal, from a real server; and which model a prompt is for."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from concertina.client import (
    AsyncClient,
    Client,
    ConcertinaError,
    InvalidRequest,
    ModelNotFound,
    SessionNotFound,
)
from server.config import EngineConfig
from server.sessions.served_model import ServedModel, serve_bundles
from tests.concertina.faults import LIMIT_S, serving

TEXT, IMAGE = "tiny-text", "tiny-image"


@pytest.fixture(scope="module")
def engines(text_bundle: Path, image_bundle: Path) -> Iterator[dict[str, ServedModel]]:
    opened = serve_bundles([text_bundle, image_bundle], EngineConfig(threads=1))
    yield opened
    for engine in opened.values():
        engine.close()


@pytest.fixture
async def address(engines: dict[str, ServedModel]) -> AsyncIterator[str]:
    async with serving(engines) as server:
        yield server.address


@pytest.fixture(params=["blocking", "asyncio"])
def call(request: pytest.FixtureRequest, address: str) -> Any:
    """Makes a call with one of the two clients."""

    async def call(make: Callable[[Any], Any]) -> Any:
        async with asyncio.timeout(LIMIT_S):
            if request.param == "blocking":
                with Client(address) as client:
                    return await asyncio.to_thread(make, client)
            async with AsyncClient(address) as client:
                made = make(client)
                return await made if inspect.isawaitable(made) else made

    return call


@pytest.mark.parametrize(
    ("wrong", "field", "limit"),
    [
        ({"top_p": 2.0}, "sampling.top_p", 1),
        ({"top_p": 0.0}, "sampling.top_p", 0),
        ({"min_p": -1.0}, "sampling.min_p", 0),
        ({"temperature": -1.0}, "sampling.temperature", 0),
        ({"presence_penalty": -3.0}, "sampling.presence_penalty", -2),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty", 0),
        ({"logit_bias": {999: 1.0}}, "sampling.logit_bias", 255),
        ({"logit_bias": {9: 101.0}}, "sampling.logit_bias[9]", 100),
        ({"allowed_token_ids": [1, 256]}, "sampling.allowed_token_ids[1]", 255),
        ({"bad_words": ["x" * 65]}, "sampling.bad_words[0]", 64),
        ({"stop": ["x"] * 17}, "stopping.stop", 16),
        ({"stop": [""]}, "stopping.stop[0]", 1),
        ({"max_tokens": 97}, "stopping.max_tokens", 95),
        ({"max_tokens": 0}, "stopping.max_tokens", 1),
        ({"max_tokens": 5, "min_tokens": 6}, "stopping.min_tokens", 5),
        ({"time_limit": 0.0}, "stopping.time_limit", 0),
        ({"n": 0}, "output.n", 1),
        ({"logprobs": 21}, "output.logprobs", 20),
        ({"priority": 101}, "priority", 100),
        ({"keep": 90_000.0}, "keep", 86_400),
        ({"label": "nope"}, "prompt.label", None),
        ({"prompt": "x" * 96}, "prompt", 95),
        ({"prompt": [1, 256]}, "prompt.tokens.ids[1]", 255),
        ({"prompt": bytes(24)}, "prompt.image", None),
        ({"seed": -1}, "sampling.seed", 0),  # found by the client
        ({"timeout": -1}, "timeout", 0),
    ],
    ids=str,
)
async def test_a_refusal_names_field_and_limit(
    call: Any, wrong: dict[str, Any], field: str, limit: float | None
) -> None:
    parameters = {"prompt": "x", "model": TEXT, **wrong}
    with pytest.raises(InvalidRequest) as raised:
        await call(lambda client: client.complete(**parameters))
    assert (raised.value.field, raised.value.limit) == (field, limit)
    assert field.partition("[")[0].rpartition(".")[2] in str(raised.value)


@pytest.mark.parametrize(
    ("make", "kind", "field", "limit"),
    [
        (lambda client: client.score("x" * 97, model=TEXT), InvalidRequest, "prompt", 96),
        (lambda client: client.model("nope"), ModelNotFound, "model", None),
        (lambda client: client.sessions.fork("nope", 0), InvalidRequest, "n", 1),
        (lambda client: client.sessions.pause("nope"), SessionNotFound, "", None),
    ],
)
async def test_so_do_calls_that_are_no_streams(
    call: Any, make: Any, kind: type[ConcertinaError], field: str, limit: float | None
) -> None:
    with pytest.raises(kind) as raised:
        await call(make)
    assert (raised.value.field, raised.value.limit) == (field, limit)


async def test_the_only_model_that_takes_a_prompt_is_found(call: Any) -> None:
    assert (await call(lambda client: client.complete("x", max_tokens=1))).accepted.model == TEXT
    rows = bytes(3 * 8)
    done = await call(lambda client: client.complete(rows, max_tokens=1))
    assert (done.accepted.model, len(done.rgb[0])) == (IMAGE, 3)
    assert (await call(lambda client: client.score("x"))).model == TEXT
    label = (await call(lambda client: client.model(IMAGE))).labels[0]
    done = await call(lambda client: client.complete(label=label, max_tokens=1))
    assert done.accepted.model == IMAGE


async def test_a_prompt_of_either_kind_finds_none(call: Any) -> None:
    for prompt in (None, [1, 2]):
        with pytest.raises(ModelNotFound, match="several are served: choose one of") as raised:
            await call(lambda client, prompt=prompt: client.complete(prompt))
        assert raised.value.field == "model"
