"""An engine generates the right tokens for each stream, and ends where the request asks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from server.arrays import Floats, Ints
from server.bundles.bundle import Bundle
from server.checkpoint import Finish, FinishReason
from server.engine import decoding
from server.engine.sampling.sampler import SamplingBatch, sample
from server.engine.updates import Scored
from server.request import Request, SamplingParameters, prompt_of
from server.sessions.subscriber import PromptLogprobs
from tests.server.engines import (
    LIMIT_S,
    DrivenModel,
    Gate,
    Outcome,
    ask,
    change_logits,
    generate,
    script,
    until,
)

Start = Callable[..., DrivenModel]
Logits = Callable[[list[int]], npt.NDArray[np.float64]]


def _requests(bundle: Bundle, count: int) -> list[Request]:
    """Prompts and outputs of many lengths, most of them near block borders."""
    rng = np.random.default_rng(5)
    vocabulary, made = bundle.manifest.vocabulary, []
    for seed in range(count):
        length = int(rng.choice([0, 1, 7, 8, 9, 16, 30]))
        tokens = rng.integers(vocabulary, size=length)
        start = vocabulary + rng.integers(1 + len(bundle.manifest.labels))
        sampling = SamplingParameters(
            temperature=float(rng.choice([0, 0.7, 1.0])),
            top_k=int(rng.choice([0, 20])),
            top_p=float(rng.choice([0.9, 1.0])),
            seed=seed,
        )
        made.append(
            Request(
                prompt_of(start, tokens, bundle.typecode),
                sampling,
                max_tokens=int(rng.integers(1, 34)),
            )
        )
    return made


async def test_tokens_follow_from_the_model_and_the_seed(
    bundle: Bundle, start: Start, exact_logits: Callable[[Bundle], Logits]
) -> None:
    """The engine gives the same tokens as the parallel model and the sampler."""
    model, exact = start(bundle), exact_logits(bundle)
    for wanted in _requests(bundle, 16):
        outcome = await generate(model, wanted)
        count, length = len(outcome.tokens), len(wanted.prompt)
        assert count == wanted.max_tokens
        prompt = [wanted.prompt.start, *wanted.prompt.tokens.tolist()]
        logits = exact([*prompt, *outcome.tokens[:-1]])[-count:]
        expected = sample(
            logits.astype(np.float32),
            SamplingBatch.of([wanted.sampling] * count),
            np.arange(length, length + count),
        )
        assert outcome.tokens == tuple(expected.tolist())


async def test_a_stream_is_the_same_alone_and_among_others(bundle: Bundle, start: Start) -> None:
    """Sixteen streams share four slots; none affects another."""
    model, requests = start(bundle, slots=4), _requests(bundle, 16)
    alone = [await generate(model, wanted) for wanted in requests]
    assert len({outcome.tokens for outcome in alone}) == len(requests)
    order = random.Random(3)

    async def late(wanted: Request) -> Outcome:
        for _ in range(order.randrange(20)):
            await asyncio.sleep(0)
        return await generate(model, wanted)

    for _ in range(3):
        shuffled = order.sample(range(16), 16)
        crowd = await asyncio.gather(*[late(requests[index]) for index in shuffled])
        for index, outcome in zip(shuffled, crowd, strict=True):
            assert (outcome.tokens, outcome.text) == (alone[index].tokens, alone[index].text)


async def test_the_batch_is_as_large_as_it_can_be(text: Bundle, start: Start) -> None:
    model = start(text, slots=3)
    batches: list[int] = []

    def count(logits: Floats, positions: Ints) -> Floats:
        batches.append(len(positions))
        return logits

    change_logits(model, count)
    await asyncio.gather(*[generate(model, ask(max_tokens=20)) for _ in range(7)])
    assert max(batches) == 3
    assert sum(batches) == 7 * 20
    assert len(batches) < 70


async def test_scores_are_the_bits_of_the_model(
    bundle: Bundle, start: Start, exact_logits: Callable[[Bundle], Logits]
) -> None:
    model, exact = start(bundle), exact_logits(bundle)
    rng = np.random.default_rng(1)
    for length in (1, 7, 8, 9, bundle.context):
        vocabulary = bundle.manifest.vocabulary
        prompt = prompt_of(vocabulary, rng.integers(vocabulary, size=length), bundle.typecode)
        outcome = await generate(model, Request(prompt, score=True))
        logits = exact(prompt.inputs().tolist())
        logits -= logits.max(axis=1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        expected = -logs[np.arange(length), prompt.tokens] / np.log(2)
        assert isinstance(outcome.ending, Scored)
        assert outcome.ending.bits == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("reports", [False, True])
async def test_a_prompt_that_is_predicted_takes_little_memory_for_logits(
    text: Bundle, start: Start, reports: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many of its tokens one pass could push: a row may have 150,000 logits."""
    model, sizes = start(text), list[int]()
    prompt = b"some words to score"
    wanted = ask(prompt, 3, prompt_logprobs=2) if reports else ask(prompt, score=True)
    runtime: Any = model.engine.runtime
    prefill = runtime.prefill

    def noted(row: int, tokens: Ints, *more: Any) -> Floats:
        sizes.append(len(tokens))
        pushed: Floats = prefill(row, tokens, *more)
        return pushed

    async def predicted() -> list[float]:
        found: list[float] = []
        async for event in model.events(model.submit(wanted)):
            if isinstance(event, PromptLogprobs):
                found += [one.logprob for one in event.logprobs]
            elif isinstance(event, Scored):
                found += event.bits
        assert len(found) == len(prompt)
        return found

    runtime.prefill = noted
    expected = pytest.approx(await predicted(), abs=1e-4)
    assert max(sizes) == text.span
    for room, most in ((3 * 4 * text.vocabulary, 3), (1, 1)):
        sizes.clear()
        monkeypatch.setattr(decoding, "PREDICTED_BYTES", room)
        assert await predicted() == expected
        assert (max(sizes), sum(sizes)) == (most, len(prompt))
    sizes.clear()
    await generate(model, ask(prompt, 3))  # whose own tokens are not predicted
    assert max(sizes) == text.span


async def test_scoring_needs_no_slot(text: Bundle, start: Start) -> None:
    """It runs while the only slot is taken, and affects no stream."""
    model = start(text, slots=1)
    expected = await generate(model, ask(max_tokens=400))
    order: list[str] = []

    async def noted(name: str, wanted: Request) -> Outcome:
        outcome = await generate(model, wanted)
        order.append(name)
        return outcome

    long, _, scored = await asyncio.gather(
        noted("long", ask(max_tokens=400)),
        noted("scored", ask(b"some words to score", score=True)),
        noted("scored", ask(b"more", score=True)),
    )
    assert order == ["scored", "scored", "long"]
    assert long.tokens == expected.tokens
    assert isinstance(scored.ending, Scored)


async def test_two_event_loops_share_an_engine(text: Bundle, start: Start) -> None:
    model, requests = start(text, slots=4), _requests(text, 12)
    expected = [(await generate(model, wanted)).tokens for wanted in requests]
    outcomes: dict[str, list[Outcome]] = {}

    async def main(name: str) -> None:
        for _ in range(3):
            outcomes[name] = await asyncio.gather(*[generate(model, w) for w in requests])

    def run(name: str) -> None:
        asyncio.run(main(name))

    both = [asyncio.to_thread(run, name) for name in "ab"]
    await asyncio.wait_for(asyncio.gather(*both), LIMIT_S)
    assert [[outcome.tokens for outcome in outcomes[name]] for name in "ab"] == [expected] * 2


async def test_a_closed_event_loop_leaves_nothing(text: Bundle, start: Start) -> None:
    """Its streams end with the first token that cannot be delivered."""
    model = start(text, slots=2)

    async def forgetful() -> None:
        for _ in range(3):
            model.submit(ask(max_tokens=90))

    with Gate(model) as gate:
        await asyncio.to_thread(lambda: asyncio.run(forgetful()))
        gate.let(3)
        await until(lambda: model.engine.ledger.held.streams == 0)
        assert gate.passes <= 3
    assert (await generate(model, ask())).tokens


# ---- when a stream ends


def _finish(outcome: Outcome) -> Finish:
    assert isinstance(outcome.ending, Finish), outcome.ending
    return outcome.ending


@pytest.mark.parametrize(
    ("fields", "tokens", "sent", "reason", "stop", "generated"),
    [
        ({}, b"one two th", "one two th", FinishReason.MAX_TOKENS, None, 10),
        ({"stop": ("two",)}, b"one two", "one ", FinishReason.STOP, "two", 7),
        ({"stop": ("three", "o th")}, b"one two th", "one tw", FinishReason.STOP, "o th", 10),
        ({"stop": ("two thirds",)}, b"one two th", "one two th", FinishReason.MAX_TOKENS, None, 10),
        ({"stop_tokens": frozenset(b"wx")}, b"one t", "one t", FinishReason.STOP, None, 6),
        ({"end_tokens": frozenset({ord("w")})}, b"one t", "one t", FinishReason.END, None, 6),
        # Text held back for a stop string is sent if the stream ends without it.
        (
            {"stop_tokens": frozenset(b"w"), "stop": ("e tx",)},
            b"one t",
            "one t",
            FinishReason.STOP,
            None,
            6,
        ),
        (
            {"end_tokens": frozenset({ord("w")}), "stop": ("e tx",)},
            b"one t",
            "one t",
            FinishReason.END,
            None,
            6,
        ),
    ],
)
async def test_a_stream_ends_where_its_request_asks(
    text: Bundle,
    start: Start,
    fields: dict[str, Any],
    tokens: bytes,
    sent: str,
    reason: FinishReason,
    stop: str | None,
    generated: int,
) -> None:
    model = start(text)
    script(model, b"one two three".ljust(text.context))
    outcome = await generate(model, ask(max_tokens=10, **fields))
    assert (bytes(outcome.tokens), outcome.text) == (tokens, sent)
    finish = _finish(outcome)
    assert (finish.reason, finish.stop, finish.generated) == (reason, stop, generated)
    pushed = generated  # the start token and all but the last
    assert finish.state_bytes == sum(text.state_bytes(pushed).values())


async def test_characters_arrive_whole(text: Bundle, start: Start) -> None:
    model = start(text)
    script(model, "aé€😀".encode().ljust(text.context))
    for count, expected in [(1, "a"), (3, "aé"), (6, "aé€"), (8, "aé€\ufffd"), (10, "aé€😀")]:
        outcome = await generate(model, ask(max_tokens=count))
        assert (len(outcome.tokens), outcome.text) == (count, expected)


async def test_the_context_can_be_filled_to_the_last_token(bundle: Bundle, start: Start) -> None:
    model, vocabulary = start(bundle), bundle.manifest.vocabulary
    for length in (0, 9, bundle.context - 1):
        wanted = Request(
            prompt_of(vocabulary, [1] * length, bundle.typecode),
            max_tokens=bundle.context - length,
            complete_at=bundle.codec.complete_at,
        )
        outcome = await generate(model, wanted)
        assert len(outcome.tokens) == bundle.context - length
        is_text = bundle.codec.writes_text
        whole = FinishReason.MAX_TOKENS if is_text else FinishReason.END
        assert _finish(outcome).reason == whole
        assert bool(outcome.text) == is_text


async def test_an_image_that_is_cut_short_is_not_complete(image: Bundle, start: Start) -> None:
    wanted = Request(prompt_of(17, [], "B"), max_tokens=63, complete_at=64)
    outcome = await generate(start(image), wanted)
    assert _finish(outcome).reason == FinishReason.MAX_TOKENS


async def test_times_are_in_order(text: Bundle, start: Start) -> None:
    finish = _finish(await generate(start(text), ask(b"some prompt", max_tokens=30)))
    assert 0 < finish.queue_s < finish.first_token_s < finish.total_s < LIMIT_S
