"""LangChain's OpenAI and ChatOpenAI: whole answers, streams, batches, chains, usage."""

from __future__ import annotations

import json
import math

from concertina.client import Client
from tests.clients.environments import Environment, url
from tests.e2e.servers import Server

SAID = [
    {"role": "system", "content": "the fox"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "jumps"},
]


def test_it_completes(client: Environment, texts: Server) -> None:
    printed = client.python(
        "langchain_client.py", "completes", "python-4k", **url(texts.http_address)
    )
    told = json.loads(printed)
    with Client(texts.address) as own:
        first, second = (
            own.complete(prompt, max_tokens=60, seed=7, temperature=1, top_p=1)
            for prompt in ("import ", "class ")
        )
    assert told["whole"] == told["streamed"] == first.text
    assert told["several"] == [first.text, second.text]
    assert told["usage"]["completion_tokens"] == 120
    assert told["usage"]["prompt_tokens"] == len("import class ")
    assert told["reason"] == "length"


def test_it_chats(client: Environment, chats: Server) -> None:
    printed = client.python("langchain_client.py", "chats", "tiny-llama", **url(chats.http_address))
    told = json.loads(printed)
    asked = {"max_tokens": 20, "seed": 3, "temperature": 1.0}
    with Client(chats.address) as own:
        wanted = own.complete(SAID, **asked)  # type: ignore[arg-type]
        chained = [
            own.complete([SAID[0], {"role": "user", "content": text}], **asked).text  # type: ignore[arg-type]
            for text in ("Hello", "jumps")
        ]
    assert told["whole"] == told["streamed"] == told["later"] == wanted.text
    assert told["chain"] == chained
    for usage in (told["usage"], told["streamed_usage"]):
        assert usage["input_tokens"] == wanted.usage.prompt_tokens
        assert usage["output_tokens"] == wanted.usage.generated_tokens
    assert told["reason"] in ("length", "stop")
    assert len(told["logprobs"]) == wanted.usage.generated_tokens
    assert all(math.isfinite(each["logprob"]) for each in told["logprobs"])
    assert all(len(each["top_logprobs"]) == 2 for each in told["logprobs"])
    assert told["animal"].keys() == {"name", "quick"}  # its class has checked the values
