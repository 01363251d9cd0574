"""`llm`, the command line: models in extra-openai-models.yaml, streams, conversations, its log."""

from __future__ import annotations

import json

from concertina.client import Client
from tests.clients.environments import Environment
from tests.e2e.servers import Server

MODELS = """
- model_id: {name}
  model_name: {name}
  api_base: http://{address}/v1
  supports_schema: true
"""
COMPLETES = "  completion: true\n"


def test_it_completes(client: Environment, texts: Server) -> None:
    listed = MODELS.format(name="python-4k", address=texts.http_address) + COMPLETES
    (client.home / "extra-openai-models.yaml").write_text(listed)
    here = {"LLM_USER_PATH": str(client.home)}
    options = ["-o", "max_tokens", "120", "-o", "seed", "7", "-o", "stop", "\n\n"]
    with Client(texts.address) as own:
        wanted = own.complete("def read(", max_tokens=120, seed=7, stop=["\n\n"])
    assert wanted.text
    for way in ([], ["--no-stream"]):
        text = client.run("llm", "-m", "python-4k", "def read(", *options, *way, **here)
        assert text == wanted.text + "\n"
        (entry,) = json.loads(client.run("llm", "logs", "--json", "-n", "1", **here))
        assert entry["response"] == wanted.text
    # It reads no usage of streams; of whole answers it has no other place for it.
    assert entry["response_json"]["usage"]["completion_tokens"] == wanted.usage.generated_tokens


def test_it_chats_and_goes_on(client: Environment, chats: Server) -> None:
    listed = MODELS.format(name="tiny-llama", address=chats.http_address)
    (client.home / "extra-openai-models.yaml").write_text(listed)
    here = {"LLM_USER_PATH": str(client.home)}
    options = ["-o", "max_tokens", "20", "-o", "seed", "3"]
    said = [{"role": "system", "content": "the fox"}, {"role": "user", "content": "Hello"}]
    with Client(chats.address) as own:
        first = own.complete(said, max_tokens=20, seed=3)
        said += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "jumps"}]
        second = own.complete(said, max_tokens=20, seed=3)
    asked = ["-m", "tiny-llama", "--system", "the fox", "Hello"]
    assert client.run("llm", *asked, *options, **here) == first.text + "\n"
    assert client.run("llm", "-c", "jumps", *options, **here) == second.text + "\n"
    (entry,) = json.loads(client.run("llm", "logs", "--json", "-n", "1", **here))
    assert entry["output_tokens"] == second.usage.generated_tokens
    assert entry["input_tokens"] == second.usage.prompt_tokens


def test_its_schemas_are_kept(client: Environment, chats: Server) -> None:
    listed = MODELS.format(name="tiny-llama", address=chats.http_address)
    (client.home / "extra-openai-models.yaml").write_text(listed)
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["fox", "dog"]}, "quick": {"type": "boolean"}},
        "required": ["name", "quick"],
        "additionalProperties": False,
    }
    asked = ["-m", "tiny-llama", "--schema", json.dumps(schema), "Who is it?", "-o", "seed", "5"]
    told = json.loads(client.run("llm", *asked, LLM_USER_PATH=str(client.home)))
    assert told.keys() == {"name", "quick"}
    assert told["name"] in ("fox", "dog") and isinstance(told["quick"], bool)
