"""Whole streams, put together."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from concertina.client import AsyncClient, Client, Completion, GenerationFailed, StreamCut, Tokens
from tests.concertina.conftest import WAIT, Fake

Using = Callable[[Callable[[Any], Any]], Any]


def _blocking(address: str, use: Callable[[Any], Any]) -> Any:
    with Client(address) as client:
        return use(client)


def _asyncio(address: str, use: Callable[[Any], Any]) -> Any:
    async def run() -> Any:
        async with AsyncClient(address) as client:
            return await use(client)

    return asyncio.run(asyncio.wait_for(run(), WAIT))


@pytest.fixture(params=[_blocking, _asyncio], ids=["blocking", "asyncio"])
def using(request: pytest.FixtureRequest, fake: Fake) -> Using:
    """Uses one of the two clients."""
    return lambda use: request.param(fake.address, use)


def test_a_text_is_one_call(fake: Fake, using: Using) -> None:
    fake.script = [fake.accepted(), fake.text(2, 0, "é"), fake.text(3, 2, "b"), fake.finished(4)]
    done: Completion = using(lambda client: client.complete("x", seed=7))
    assert done.text == "éb"
    assert (done.texts, done.rgb) == (("éb",), (b"",))
    assert (done.reason, done.usage.generated_tokens, done.accepted.seed) == ("max_tokens", 9, 7)
    assert fake.requests[0].prompt.text == "x"
    assert using(lambda client: client.generate("x").text()) == "éb"


def test_several_outputs_are_kept_apart(fake: Fake, using: Using) -> None:
    fake.script = [
        fake.accepted(outputs=2),
        fake.text(2, 0, "b", output=1),
        fake.text(3, 0, "a"),
        fake.finished(4, output=1),
        fake.text(5, 1, "A"),
        fake.finished(6),
    ]
    done: Completion = using(lambda client: client.complete("x", n=2))
    assert (done.texts, done.text) == (("aA", "b"), "aA")
    assert [end.output for end in done.finished] == [0, 1]
    assert using(lambda client: client.generate("x", n=2).text()) == "aAb"


def test_pixels_are_put_together_too(fake: Fake, using: Using) -> None:
    fake.script = [fake.accepted(), fake.pixels(2, 0, [2]), fake.pixels(3, 1, [3])]
    fake.script.append(fake.finished(4))
    assert using(lambda client: client.complete()).rgb == (bytes([255, 0, 0, 0, 0, 255]),)


def test_the_rest_of_a_text_follows_what_was_read(fake: Fake) -> None:
    fake.script = [fake.accepted(), fake.text(2, 0, "a"), fake.text(3, 1, "b"), fake.finished(4)]
    with Client(fake.address) as client, client.generate("x") as stream:
        for event in stream:
            if isinstance(event, Tokens):
                break
        assert stream.text() == "b"


def test_an_error_is_raised(fake: Fake, using: Using) -> None:
    fake.script = [fake.accepted(), fake.text(2, 0, "a"), fake.error(3)]
    for use in (lambda client: client.complete("x"), lambda client: client.generate("x").text()):
        with pytest.raises(GenerationFailed, match="it broke"):
            using(use)


def test_what_was_cancelled_is_not_complete(fake: Fake) -> None:
    fake.script = [fake.accepted(), fake.text(2, 0, "a"), fake.never]
    with Client(fake.address) as client, client.generate("x") as stream:
        next(stream)
        stream.cancel()
        with pytest.raises(StreamCut, match="cancelled before its end"):
            stream.complete()


def test_the_asyncio_calls_are_awaited() -> None:
    assert inspect.iscoroutinefunction(AsyncClient.complete)
    assert not inspect.iscoroutinefunction(Client.complete)
