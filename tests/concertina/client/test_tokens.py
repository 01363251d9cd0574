"""What a client learns of tokens, and how it sends messages."""

from __future__ import annotations

import grpc
import pytest

from concertina.client import AsyncClient, Client, InvalidRequest, TokenList
from concertina.client.models import Score
from concertina.client.requests import prompt_message
from concertina.v1 import generation_service_pb2 as pb
from tests.concertina.conftest import Fake, Status

_TOKENS = TokenList("prose", "f0", (0, 1), (b"ab", b"c"))
_BACK = TokenList("prose", "f0", (7, 8), (b"a", b"\xc3"), "aé", b"rgb")


def test_a_client_tokenizes(fake: Fake) -> None:
    with Client(fake.address) as client:
        assert client.tokenize("abc", model="prose") == _TOKENS
        assert client.detokenize([7, 8], model="prose") == _BACK
    asked, back = fake.requests
    assert (asked.model, asked.prompt.text) == ("prose", "abc")
    assert list(back.ids) == [7, 8]


async def test_an_async_client_tokenizes(fake: Fake) -> None:
    async with AsyncClient(fake.address) as client:
        assert await client.tokenize("abc", model="prose") == _TOKENS
        assert await client.detokenize((7, 8), model="prose") == _BACK


def test_refusals_are_errors(fake: Fake) -> None:
    fake.refusal = Status(grpc.StatusCode.INVALID_ARGUMENT, "ids[1] is 999")
    with Client(fake.address) as client:
        for call in (lambda: client.tokenize("x"), lambda: client.detokenize([999])):
            with pytest.raises(InvalidRequest, match="ids\\[1\\] is 999"):
                call()
        with pytest.raises(InvalidRequest, match="ids"):
            client.detokenize([-1])


def test_messages_are_a_prompt() -> None:
    made = prompt_message(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], None
    )
    assert made is not None and made.WhichOneof("content") == "messages"
    assert list(made.messages.messages) == [
        pb.Message(role="system", content="Be brief."),
        pb.Message(role="user", content="Hi"),
    ]
    for wrong in ({"role": 7}, {"speaker": "me"}):
        with pytest.raises(InvalidRequest):
            prompt_message([wrong], None)  # type: ignore[list-item]


def test_bits_per_byte_are_those_of_the_text() -> None:
    score = Score("prose", "f0", bits_per_token=6.0, bits=(4.0, 8.0), text_bytes=8)
    assert score.bits_per_byte == 1.5
    assert Score("pictures", "f0", 6.0, (4.0, 8.0)).bits_per_byte is None
