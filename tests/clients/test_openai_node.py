"""OpenAI's client for Node.js, as npm installs it."""

from __future__ import annotations

import json

from concertina.client import Client
from tests.clients.environments import PROGRAMS, Environment, url
from tests.e2e.servers import Server


def read(client: Environment, what: str, model: str, address: str) -> dict[str, object]:
    """What the client reads."""
    program = PROGRAMS / "node_client.mjs"
    told: dict[str, object] = json.loads(
        client.run("node", program, what, model, CLIENT=str(client.folder), **url(address))
    )
    return told


def test_it_completes(client: Environment, texts: Server) -> None:
    told = read(client, "completes", "python-4k", texts.http_address)
    with Client(texts.address) as own:
        wanted = own.complete("import ", max_tokens=60, seed=7).text
    assert told == {
        "models": ["python-4k"],
        "whole": wanted,
        "logprobs": 60,
        "streamed": wanted,
        "usage": {"prompt_tokens": 7, "completion_tokens": 60, "total_tokens": 67},
        "refused": ["BadRequestError", 400, "temperature"],
        "missing": ["NotFoundError", 404, "model"],
    }


def test_it_chats(client: Environment, chats: Server) -> None:
    told = read(client, "chats", "tiny-llama", chats.http_address)
    with Client(chats.address) as own:
        wanted = own.complete([{"role": "user", "content": "Hello"}], max_tokens=20, seed=3)
    assert told["whole"] == told["final"] == told["heard"] == wanted.text
    usage = wanted.usage
    assert told["usage"] == {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.generated_tokens,
        "total_tokens": usage.prompt_tokens + usage.generated_tokens,
    }
    assert told["parsed"] in ({"quick": True}, {"quick": False})
