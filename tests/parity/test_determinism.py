"""A stream's tokens, text and log-probabilities are its own, whatever else the server does."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from server.api.prompt import empty_prompt
from server.bundles.bundle import Bundle, load_bundle
from server.checkpoint import Checkpoint, Finish, FinishReason, TokenLogprobs
from server.config import EngineConfig
from server.engine.restore import ResumeCursor
from server.engine.stream import Stream
from server.request import (
    Lease,
    LogitsProcessors,
    Request,
    SamplingParameters,
    prompt_of,
)
from server.sessions.subscriber import Delta
from tests.checkpoints import in_few_bits
from tests.parity.served import TOLERANCE
from tests.pretrained_bundles import FOLDED_LLAMA, LLAMA, MISTRAL, make_pretrained_bundle
from tests.server.engines import LIMIT_S, DrivenModel, together, until
from tests.server.tokenizer_bundles import make_tokenizer_bundle
from tests.tokenizers_made import BYTE_FALLBACK, trained

slow = pytest.mark.slow
RULES = LogitsProcessors(repetition_penalty=1.3, frequency_penalty=0.4)
PROMPTS = (b"", b"a", b"abcdefg", b"abcdefgh", b"abcdefghi", b"abcabcabcabcabc", b"0123456789" * 3)
MORE = 40

Start = Callable[..., DrivenModel]


@dataclass
class Output:
    """All that a reader gets of a stream."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: FinishReason | None = None

    def rest(self, tokens: int, characters: int) -> Output:
        """What is left for a reader who has so much of it."""
        text, logprobs = self.text[characters:], self.logprobs[tokens:]
        return Output(self.tokens[tokens:], text, logprobs, self.reason)


@cache
def bundle_in(folder: Path) -> Bundle:
    """The bundle in `folder`, loaded once."""
    return load_bundle(folder)


def wanted(folder: Path, number: int) -> Request:
    """One of as many different requests as are asked for. The ids are there in every vocabulary."""
    bundle, ids = bundle_in(folder), [*PROMPTS[number % len(PROMPTS)]]
    prompt = prompt_of(empty_prompt(bundle).start, ids, bundle.typecode)
    number += 1
    sampling = SamplingParameters(
        seed=number,
        temperature=0.0 if number % 5 == 0 else 0.9,
        logprobs=2,
        processors=RULES if number % 4 == 0 else None,
    )
    return Request(prompt, sampling, MORE)


async def read(model: DrivenModel, stream: Stream) -> Output:
    """Reads a stream to its end."""
    output = Output()
    async with asyncio.timeout(LIMIT_S):
        async for event in model.events(stream):
            if isinstance(event, Delta):
                output.tokens += event.tokens
                output.text += event.text
                output.logprobs += event.logprobs
            else:
                assert isinstance(event, Finish), event
                output.reason = event.reason
    return output


async def read_all(model: DrivenModel, requests: list[Request]) -> list[Output]:
    """The outputs of requests that reach the engine at once."""
    with together(model):
        streams = [model.submit(request) for request in requests]
    return list(await asyncio.gather(*(read(model, stream) for stream in streams)))


@pytest.fixture(
    scope="module",
    params=[
        *("float16", "int8", "int4", "state8", "pieces", LLAMA, MISTRAL, FOLDED_LLAMA),
        f"{FOLDED_LLAMA} state8",
        *(pytest.param(f"{FOLDED_LLAMA} {kind}", marks=slow) for kind in ("int8-state8", "int4")),
        *(pytest.param(kind, marks=slow) for kind in ("int8-state8", f"{LLAMA} int8")),
        *(pytest.param(f"{MISTRAL} {kind}", marks=slow) for kind in ("int4", "state8")),
    ],
)
def folder(request: pytest.FixtureRequest, tiny_bundles: Path) -> Path:
    """The bundle `tiny-text`, with matrices of each type, and with caches in int8.

    Also one that folds and whose tokens are pieces of text, and pretrained models of such tokens.
    """
    if request.param == "pieces":
        begin = trained(BYTE_FALLBACK).token_to_id("<s>")
        return make_tokenizer_bundle(tiny_bundles / "pieces", BYTE_FALLBACK, begin_token=begin)
    kind, _, bits = request.param.rpartition(" ") if " " in request.param else ("", "", "")
    if kind or request.param in (LLAMA, MISTRAL, FOLDED_LLAMA):
        return in_few_bits(make_pretrained_bundle(tiny_bundles, kind or request.param), bits)
    return in_few_bits(request.getfixturevalue("text_bundle"), request.param)


@pytest.fixture
async def start(folder: Path) -> AsyncIterator[Start]:
    """Starts models of the bundle, and closes them at the end."""
    models: list[DrivenModel] = []

    def start(**settings: Any) -> DrivenModel:
        settings = {"threads": 1, "prefix_cache_bytes": 0, "slots": 4, **settings}
        models.append(DrivenModel(bundle_in(folder), EngineConfig(**settings)))
        return models[-1]

    yield start
    for model in models:
        model.close()


_ALONE: dict[tuple[Path, int], Output] = {}


async def alone(start: Start, folder: Path, count: int) -> list[Output]:
    """The outputs of `wanted(0)`, …, each in an engine that has nothing else to do."""
    model: DrivenModel | None = None
    for number in range(count):
        if (folder, number) not in _ALONE:
            model = model or start()
            _ALONE[folder, number] = (await read_all(model, [wanted(folder, number)]))[0]
            assert len(_ALONE[folder, number].logprobs) == MORE
    return [_ALONE[folder, number] for number in range(count)]


def assert_close(got: list[Output], expected: list[Output], folder: Path) -> None:
    """Checks that outputs are the same; with float caches, whose kernel sums the products of tokens
    that are pushed together in another order, log-probabilities within the tolerance."""
    bundle = bundle_in(folder)
    if bundle.pairs_rows or bundle.rounds_state:
        assert got == expected
        return
    for mine, other in zip(got, expected, strict=True):
        assert replace(mine, logprobs=[]) == replace(other, logprobs=[])
        for one, two in zip(mine.logprobs, other.logprobs, strict=True):
            assert one.logprob == pytest.approx(two.logprob, abs=TOLERANCE)
            assert one.top_logprobs == pytest.approx(two.top_logprobs, abs=TOLERANCE)


@pytest.mark.parametrize(
    "size", [2, 3, 8, *(pytest.param(n, marks=slow) for n in (5, 9, 17, 31, 32, 33))]
)
async def test_company_changes_nothing(start: Start, folder: Path, size: int) -> None:
    expected = await alone(start, folder, size)
    assert await read_all(start(slots=size), [wanted(folder, n) for n in range(size)]) == expected


@pytest.mark.parametrize("slots", [1, 3])
async def test_neither_does_preemption_nor_a_score(start: Start, folder: Path, slots: int) -> None:
    """Streams of rising priority displace each other; others only score, in the prefill slot."""
    expected = await alone(start, folder, len(PROMPTS))
    model = start(slots=slots)
    placement: Any = model.engine.placement
    preempt, preempted = placement.preempt, list[Stream]()
    placement.preempt = lambda stream: (preempted.append(stream), preempt(stream))
    runtime: Any = model.engine.runtime
    step, reading, scores = runtime.step, [], []
    runtime.step = lambda *given: (time.sleep(0.002), step(*given))[1]  # so that they meet
    for priority in range(len(PROMPTS)):
        stream = model.submit(replace(wanted(folder, priority), priority=priority))
        scores.append(model.submit(replace(wanted(folder, priority), score=True, priority=9)))
        reading.append(asyncio.create_task(read(model, stream)))
        await until(lambda stream=stream: stream.generated > 2 or stream.ended)  # type: ignore[misc]
    assert await asyncio.gather(*reading) == expected
    assert len(preempted) >= 2
    await until(lambda: all(score.ended for score in scores))


@pytest.mark.parametrize(
    "chunk", [1, 3, 8, pytest.param(2, marks=slow), pytest.param(7, marks=slow)]
)
async def test_neither_do_the_passes_of_a_prompt(start: Start, folder: Path, chunk: int) -> None:
    expected = await alone(start, folder, len(PROMPTS))
    requests = [wanted(folder, n) for n in range(len(PROMPTS))]
    assert_close(await read_all(start(prefill_chunk=chunk), requests), expected, folder)


async def test_neither_do_cached_prefixes(start: Start, folder: Path) -> None:
    expected = await alone(start, folder, len(PROMPTS))
    requests = [wanted(folder, n) for n in range(len(PROMPTS))]
    model = start(prefix_cache_bytes=10**6)
    assert await read_all(model, requests) == expected
    assert bool(model.engine.cache.prefix_bytes) == model.bundle.shares_blocks
    assert await read_all(model, requests[::-1]) == expected[::-1]


@pytest.mark.parametrize("threads", [2, pytest.param(3, marks=slow)])
async def test_neither_does_the_number_of_threads(start: Start, folder: Path, threads: int) -> None:
    expected = await alone(start, folder, 3)
    requests = [wanted(folder, n) for n in range(3)]
    assert await read_all(start(threads=threads), requests) == expected


async def test_neither_does_a_slow_reader(start: Start, folder: Path) -> None:
    expected = await alone(start, folder, 3)
    model = start(stream_buffer=4)
    streams = [model.submit(wanted(folder, n)) for n in range(3)]
    await until(lambda: len(model.engine.placement.paused) == 3)
    assert list(await asyncio.gather(*(read(model, each) for each in streams))) == expected


async def test_neither_do_drafts(
    start: Start, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where they would, there are none, and the log says why."""
    expected = await alone(start, folder, len(PROMPTS))
    model = start(draft_tokens=5)
    assert model.config == model.engine.config
    assert model.config.draft_tokens == (0 if model.bundle.pairs_rows else 5)
    refused = [record.getMessage() for record in caplog.records if "draft" in record.getMessage()]
    assert bool(refused) == model.bundle.pairs_rows
    few, sums = model.bundle.manifest.quantisation.bits, model.bundle.rounds_sums
    for message in refused:
        assert (f"{few} bits" if few else "sums over tokens") in message
        remedies = ["--weights"] * bool(few) + ["--state int8"] * sums
        assert message.endswith(f"without {' and '.join(remedies)}")
    got = [(await read_all(model, [wanted(folder, n)]))[0] for n in range(len(PROMPTS))]
    assert_close(got, expected, folder)


async def checkpoints(
    start: Start, folder: Path, number: int, company: int
) -> tuple[Output, dict[int, Checkpoint]]:
    """The output of a kept stream in a batch, and its checkpoints by number of generated tokens."""
    model, found = start(slots=company + 1), dict[int, Checkpoint]()
    lease = Lease("kept", (wanted(folder, number),), keep_s=60.0)
    step: Any = model.engine.runtime.step

    def recording(*args: Any) -> Any:
        placement = model.engine.placement
        if stream in placement.running and stream.generated not in found:
            saved = placement.save(stream)
            found[stream.generated] = replace(stream.checkpoint, saved=saved)
        return step(*args)

    model.engine.runtime.step = recording  # type: ignore[method-assign]
    with together(model):
        others = [model.submit(wanted(folder, 20 + n)) for n in range(company)]
        stream = model.open(lease).streams[0]
    outputs = await asyncio.gather(*(read(model, each) for each in (stream, *others)))
    return outputs[0], found


@pytest.mark.parametrize("number", [0, 5, pytest.param(3, marks=slow), pytest.param(6, marks=slow)])
@pytest.mark.parametrize("company", [0, 2])
async def test_neither_does_a_death(start: Start, folder: Path, number: int, company: int) -> None:
    """The stream goes on from an older state, in other company, with its reader's last ids or not.

    Without them, tokens that the reader has are drawn again.
    """
    expected = (await alone(start, folder, number + 1))[number]
    request = wanted(folder, number)
    output, found = await checkpoints(start, folder, number, company)
    assert output == expected
    other = start(slots=6)
    for stored, received in ((1, 1), (3, 9), (8, 14), (11, 30), (33, 35)):
        assert found[stored].saved is not None
        before = Checkpoint(array(other.bundle.typecode))
        text = sent_text(other.bundle, request, output, received)
        for checkpoint in (found[stored], before):
            for ids in (0, received):
                cursor = ResumeCursor(
                    received, len(text), last_ids=tuple(output.tokens[received - ids : received])
                )
                lease = Lease(f"{stored}-{ids}-{checkpoint is before}", (request,), keep_s=60.0)
                with together(other):
                    others = [other.submit(wanted(folder, 30 + n)) for n in range(company + 1)]
                    stream = other.open(lease, [checkpoint], [cursor]).streams[0]
                got = await read(other, stream)
                assert got == output.rest(received, len(text)), (stored, received, ids)
                for each in others:
                    other.cancel(each)


def sent_text(bundle: Bundle, request: Request, output: Output, tokens: int) -> str:
    """The text that comes with the first `tokens` of an output."""
    lease, text = Lease("s", (request,)), bundle.codec.text
    stream = Stream(lease, request, None, bundle.typecode, text)  # type: ignore[arg-type]
    return "".join(stream.accept_token(token, 0.0)[0] for token in output.tokens[:tokens])
