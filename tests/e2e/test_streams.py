"""What a caller gets: text, images, completions, scores, many at once, and how streams end."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading

import numpy as np
import pytest
from PIL import Image

from concertina.client import (
    Accepted,
    AsyncClient,
    Client,
    Event,
    Finished,
    FinishReason,
    Overloaded,
    Stream,
    Tokens,
)
from tests.bundles import HEIGHT, LABELS, PALETTE, WIDTH
from tests.e2e.conftest import CONTEXT, QUEUE_LIMIT, SLOTS
from tests.e2e.servers import Server, until

TEXT, IMAGE = "long-text", "tiny-image"
PIXELS = WIDTH * HEIGHT
SOON = 10.0


def accepted(events: list[Event]) -> Accepted:
    assert isinstance(events[0], Accepted)
    return events[0]


def finished(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def ids(events: list[Event]) -> list[int]:
    return [id for event in events if isinstance(event, Tokens) for id in event.ids]


def endless(client: Client, keep: float | None = None) -> Stream:
    """A stream that runs for longer than any test."""
    return client.generate(
        "a", model=TEXT, max_tokens=CONTEXT - 1, ignore_eos=True, timeout=300, keep=keep
    )


def read_on(stream: Stream) -> None:
    """Read a stream until somebody cancels it."""
    with contextlib.suppress(Exception):
        for _ in stream:
            pass


def is_idle(server: Server) -> bool:
    gauges = ("running", "waiting", "paused")
    return not any(server.metric(f"concertina_streams_{gauge}") for gauge in gauges)


def test_what_is_served(client: Client) -> None:
    models = {model.name: model for model in client.models(timeout=SOON)}
    assert set(models) == {TEXT, IMAGE}
    assert models[TEXT].context == CONTEXT
    assert models[TEXT].slots == SLOTS
    assert client.model(IMAGE, timeout=SOON) == models[IMAGE]


def test_text(client: Client) -> None:
    asked = {"model": TEXT, "seed": 7, "max_tokens": 200, "ignore_eos": True, "timeout": SOON}
    events = list(client.generate("hello", **asked))
    assert accepted(events).prompt_tokens == 5
    assert accepted(events).seed == 7
    assert finished(events).reason is FinishReason.MAX_TOKENS
    assert finished(events).usage.generated_tokens == 200
    text = "".join(event.text for event in events if isinstance(event, Tokens))
    assert text == bytes(ids(events)).decode(errors="replace")
    assert ids(list(client.generate("hello", **asked))) == ids(events)


def test_image(client: Client) -> None:
    stream = client.generate(model=IMAGE, label=LABELS[1], seed=3, timeout=SOON)
    events = list(stream)
    assert finished(events).reason is FinishReason.END
    assert len(ids(events)) == PIXELS
    rgb = b"".join(event.rgb for event in events if isinstance(event, Tokens))
    assert rgb == b"".join(bytes(PALETTE[id]) for id in ids(events))


def test_image_completion(client: Client) -> None:
    whole = ids(list(client.generate(model=IMAGE, seed=5, timeout=SOON)))
    pixels = np.array([PALETTE[id] for id in whole], np.uint8).reshape(HEIGHT, WIDTH, 3)
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    alpha[HEIGHT // 2 :] = 0
    png = io.BytesIO()
    Image.fromarray(np.concatenate([pixels, alpha], axis=2)).save(png, format="PNG")
    for prompt in (png.getvalue(), pixels[: HEIGHT // 2].tobytes()):
        events = list(client.generate(prompt, model=IMAGE, seed=5, timeout=SOON))
        assert accepted(events).prompt_tokens == PIXELS // 2
        assert isinstance(events[1], Tokens)
        assert events[1].first_position == PIXELS // 2
        # Random numbers belong to positions: the same seed paints the same lower half.
        assert ids(events) == whole[PIXELS // 2 :]


def test_score(client: Client) -> None:
    score = client.score("hello", model=TEXT, timeout=SOON)
    assert len(score.bits) == 5
    assert score.bits_per_token == pytest.approx(np.mean(score.bits))


async def test_sixteen_at_once_are_as_each_alone(server: Server) -> None:
    async with AsyncClient(server.address) as client:

        async def generate(seed: int) -> list[int]:
            stream = client.generate(
                "x" * seed, model=TEXT, seed=seed, max_tokens=100, ignore_eos=True, timeout=60
            )
            return ids([event async for event in stream])

        together = await asyncio.gather(*map(generate, range(1, 17)))
        assert [len(tokens) for tokens in together] == [100] * 16
        for seed in (1, 9, 16):
            assert await generate(seed) == together[seed - 1]


def test_a_cancelled_stream_frees_its_slot(server: Server, client: Client) -> None:
    until(lambda: is_idle(server))
    running = [endless(client) for _ in range(SLOTS)]
    for stream in running:
        assert isinstance(next(stream), Accepted)
        assert isinstance(next(stream), Tokens)
    readers = [threading.Thread(target=read_on, args=(stream,)) for stream in running]
    for reader in readers:  # or a stream would be paused, and its slot free
        reader.start()
    waiting = endless(client)
    assert isinstance(next(waiting), Accepted)
    until(lambda: server.metric("concertina_streams_waiting") == 1, SOON)
    until(lambda: server.metric("concertina_streams_running") == SLOTS, SOON)
    running[0].cancel()
    assert isinstance(next(waiting), Tokens)
    for stream in (*running, waiting):
        stream.cancel()
    for reader in readers:
        reader.join(SOON)
    until(lambda: is_idle(server), SOON)


def test_more_than_may_wait_are_refused_at_once(server: Server, client: Client) -> None:
    until(lambda: is_idle(server))
    streams = [endless(client) for _ in range(SLOTS + QUEUE_LIMIT)]
    for stream in streams:
        assert isinstance(next(stream), Accepted)
    with pytest.raises(Overloaded, match=f"at most {SLOTS + QUEUE_LIMIT} streams"):
        next(endless(client))
    for stream in streams:
        stream.cancel()
    until(lambda: is_idle(server), SOON)


def test_no_cancellation_is_lost(server: Server, client: Client) -> None:
    until(lambda: is_idle(server))
    for _ in range(20):
        stream = endless(client)
        while not isinstance(next(stream), Tokens):
            pass
        stream.cancel()
    until(lambda: is_idle(server), SOON)


def test_a_client_that_vanishes_frees_its_slots(server: Server) -> None:
    until(lambda: is_idle(server))
    with Client(server.address) as client:
        streams = [endless(client, keep=0.0) for _ in range(SLOTS)]
        for stream in streams:
            next(stream)
        until(lambda: server.metric("concertina_streams_running") == SLOTS, SOON)
    until(lambda: is_idle(server), SOON)
