"""OpenAI's own client, as it comes: it notices neither whose server it calls nor that one dies."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import jsonschema
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from loadtest.servers import free_ports, new_snapshot_key, start
from tests.e2e.servers import ROOT, START_SECONDS, Server, stop, until
from tests.server.http.gateways import Front, fronting

BUNDLE = ROOT / "bundles" / "python-4k"
MODEL = "python-4k"
TOKENS, AFTER = 1_000, 400
WAIT = 240.0


def client(front: Front) -> OpenAI:
    base = f"http://127.0.0.1:{front.port}/v1"
    return OpenAI(base_url=base, api_key="none", max_retries=0, timeout=WAIT)


@contextmanager
def two_servers(folder: Path) -> Iterator[list[Server]]:
    """Two servers that share a store."""
    options = ["--local", "--threads", "1", "--drain-seconds", "1"]
    options += ["--snapshots", f"file://{folder / 'store'}", "--snapshot-interval", "128"]
    key = new_snapshot_key()
    with ExitStack() as stack:
        servers = []
        for name in ("one", "two"):
            port, metrics_port = free_ports(2)
            log = folder / name
            process = start(
                BUNDLE,
                *options,
                port=port,
                metrics_port=metrics_port,
                environment=key,
                output=log,
            )
            stack.callback(stop, process)
            servers.append(Server(f"127.0.0.1:{port}", f"127.0.0.1:{metrics_port}", process, log))
        for server in servers:
            until(lambda server=server: "\nready" in server.output(), START_SECONDS)  # type: ignore[misc]
        yield servers


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_its_stream_survives_the_server_that_sends_it(tmp_path: Path) -> None:
    asked = {"model": MODEL, "prompt": "def ", "max_tokens": TOKENS, "seed": 11}
    asked["extra_body"] = {"ignore_eos": True}
    with (
        two_servers(tmp_path) as (one, two),
        # gRPC calls the second when the first does not answer.
        fronting(f"ipv4:{one.address},{two.address}") as front,
    ):
        api = client(front)
        text, finish = "", None
        for chunk in api.completions.create(stream=True, **asked):  # type: ignore[call-overload]
            text += chunk.choices[0].text
            finish = chunk.choices[0].finish_reason
            if len(text) >= AFTER and one.process.is_running():
                one.process.send_signal(signal.SIGKILL)
                one.process.wait(WAIT)
        assert finish == "length"
        assert one.process.returncode == -signal.SIGKILL
        assert two.metric("concertina_streams_resumed_total", source="store") == 1
        whole = api.completions.create(**asked)  # type: ignore[call-overload]
    assert text == whole.choices[0].text
    assert whole.usage.completion_tokens == TOKENS


def test_it_finds_what_it_knows(front: Front) -> None:
    api = client(front)
    assert sorted(each.id for each in api.models.list()) == ["tiny-image", "tiny-text"]
    assert api.models.retrieve("tiny-text").id == "tiny-text"
    asked = {"model": "tiny-text", "max_tokens": 9, "seed": 2}
    whole = api.completions.create(prompt="ab", n=2, logprobs=3, **asked)  # type: ignore[call-overload]
    assert [each.finish_reason for each in whole.choices] == ["length"] * 2
    assert len(whole.choices[0].logprobs.token_logprobs) == 9
    messages = [{"role": "user", "content": "a"}]
    chat = api.chat.completions.create(  # type: ignore[call-overload]
        messages=messages, logprobs=True, top_logprobs=2, **asked
    )
    assert len(chat.choices[0].logprobs.content) == 9
    parts = api.chat.completions.create(messages=messages, stream=True, **asked)  # type: ignore[call-overload]
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == chat.choices[0].message.content
    picture = api.images.generate(model="tiny-image", prompt="", n=2, size="auto")
    assert [bool(each.b64_json) for each in picture.data or ()] == [True, True]


def test_it_raises_what_it_has_for_each_refusal(front: Front) -> None:
    api = client(front)
    with pytest.raises(openai.BadRequestError) as wrong:
        api.completions.create(model="tiny-text", prompt="a", temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        api.completions.create(model="x", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="responses"):
        api.responses.create(model="tiny-text", input="a")
    with pytest.raises(openai.BadRequestError) as structure:
        api.chat.completions.create(
            model="tiny-text",
            messages=[{"role": "user", "content": "a"}],
            response_format={"type": "xml"},  # type: ignore[arg-type]
        )
    assert structure.value.param == "response_format"
    with pytest.raises(openai.BadRequestError, match="unevaluatedItems") as schema:
        api.completions.create(
            model="tiny-text",
            prompt="a",
            extra_body={"structured_outputs": {"json": {"unevaluatedItems": False}}},
        )
    assert schema.value.param == "structured_outputs"


class Person(BaseModel):
    """What an answer is to be."""

    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=150)
    tags: list[Literal["kind", "tall"]] = Field(max_length=2)


def test_it_reads_what_it_asked_for(long_front: Front) -> None:
    """Whole, of several outputs, and in parts: JSON for the schema, from weights that know none."""
    api = client(long_front)
    asked = {"model": "long-text", "messages": [{"role": "user", "content": "Who?"}], "seed": 3}
    parsed = api.chat.completions.parse(response_format=Person, n=2, max_tokens=2000, **asked)  # type: ignore[arg-type]
    people = [choice.message.parsed for choice in parsed.choices]
    assert all(isinstance(each, Person) for each in people)
    assert people[0] != people[1]
    with api.chat.completions.stream(response_format=Person, max_tokens=2000, **asked) as stream:  # type: ignore[arg-type]
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == people[0]
    schema = Person.model_json_schema()
    for extra in ({"structured_outputs": {"json": schema}}, {"guided_json": json.dumps(schema)}):
        done = api.completions.create(
            model="long-text", prompt="a", max_tokens=2000, extra_body=extra
        )
        jsonschema.validate(json.loads(done.choices[0].text), schema)
        assert done.choices[0].finish_reason == "stop"
