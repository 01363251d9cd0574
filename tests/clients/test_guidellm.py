"""guidellm: what it sent, what it read, and what it counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from concertina.client import Client
from tests.clients.environments import Environment
from tests.e2e.servers import Server

REQUESTS, PROMPT, TOKENS = 6, 50, 20


def benchmark(
    client: Environment, server: Server, model: str, path: str, tokenizer: Path
) -> list[dict[str, object]]:
    """What it keeps of each request."""
    backend = {
        "kind": "openai_http",
        "target": f"http://{server.http_address}",
        "model": model,
        "request_format": path,
        "extras": {"body": {"temperature": 0}},
    }
    out = client.home / "benchmarks.json"
    client.run(
        *("guidellm", "run", "--backend", json.dumps(backend)),
        *("--profile", "kind=concurrent,streams=2"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={TOKENS}"),
        *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
        *("--output", f"kind=json,path={out}", "--disable-progress"),
    )
    (told,) = json.loads(out.read_text())["benchmarks"]
    requests = told["requests"]
    assert (len(requests["errored"]), len(requests["successful"])) == (0, REQUESTS)
    found: list[dict[str, object]] = requests["successful"]
    return found


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_it_measures(
    path: str, client: Environment, tokenizer_folders: Path, request: pytest.FixtureRequest
) -> None:
    is_chat = "chat" in path
    server: Server = request.getfixturevalue("chats" if is_chat else "texts")
    model, folder = ("tiny-llama", "tiny-llama") if is_chat else ("python-4k", "bytes")
    read = benchmark(client, server, model, path, tokenizer_folders / folder)
    with Client(server.address) as own:
        for each in read:
            sent = json.loads(str(each["request_args"]))["body"]
            prompt = (
                sent["prompt"]
                if not is_chat
                else [
                    {
                        "role": said["role"],
                        "content": "".join(part["text"] for part in said["content"]),
                    }
                    for said in sent["messages"]
                ]
            )
            wanted = own.complete(prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True)
            assert each["output"] == wanted.text
            assert each["output_metrics"]["text_tokens"] == TOKENS  # type: ignore[index]
            assert each["input_metrics"]["text_tokens"] == wanted.usage.prompt_tokens  # type: ignore[index]
