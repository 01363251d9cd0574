"""OpenAI's own client, as it comes: it does not notice whose server it calls."""

from __future__ import annotations

import openai
import pytest
from openai import OpenAI

from tests.server.http.gateways import Front

WAIT = 240.0


def client(front: Front) -> OpenAI:
    base = f"http://127.0.0.1:{front.port}/v1"
    return OpenAI(base_url=base, api_key="none", max_retries=0, timeout=WAIT)


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
            response_format={"type": "json_object"},
        )
    assert structure.value.param == "response_format"
