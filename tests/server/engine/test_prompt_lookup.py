"""Drafts change only the number of passes."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bundles.bundle import Bundle, load_bundle
from server.checkpoint import FinishReason
from server.config import EngineConfig
from server.engine.prompt_lookup import propose
from server.request import LogitsProcessors, SamplingParameters, prompt_of
from server.sessions.served_model import ServedModel
from tests.server.engines import LIMIT_S, ask, generate, read, until

Start = Callable[..., ServedModel]


@pytest.mark.parametrize(
    ("recent", "draft"),
    [
        (b"one two three one two", b" three o"),
        (b"abcdXabcdYabcd", b"Yabcd"),  # after the latest occurrence
        (b"aaaaaaaa", b"a"),
        (b"abc", b""),
        (b"", b""),
        (b"one two three", b""),
    ],
)
def test_the_tokens_after_the_latest_occurrence_are_proposed(recent: bytes, draft: bytes) -> None:
    assert bytes(propose(array("B", recent), 8)) == draft


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 9), st.sampled_from("BHI"))
def test_a_draft_follows_an_earlier_occurrence(tokens: list[int], size: int, code: str) -> None:
    draft = propose(array(code, tokens), size).tolist()
    assert len(draft) <= size
    if draft:
        at = [n for n in range(4, len(tokens)) if tokens[n - 4 : n] == tokens[-4:]]
        assert any(tokens[n : n + len(draft)] == draft for n in at)


def test_matches_begin_at_whole_tokens() -> None:
    wide = array("H", [0x0101, 0x0101, 0x0101, 0x0101, 7, 0x0101, 0x0101, 0x0101, 0x0101])
    assert propose(wide, 3).tolist() == [7, 0x0101, 0x0101]


RULES = LogitsProcessors(repetition_penalty=1.2, frequency_penalty=0.3, bad_words=((1, 2),))


@pytest.mark.parametrize("attention", ["fixed_bundle", "full_bundle", "text_bundle"])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParameters(temperature=0),
        SamplingParameters(seed=3, temperature=0.3),
        SamplingParameters(seed=5, temperature=0.5, logprobs=2, processors=RULES),
    ],
)
async def test_tokens_are_the_same_with_drafts_and_without(
    start: Start, attention: str, sampling: SamplingParameters, request: pytest.FixtureRequest
) -> None:
    """Text that repeats itself makes drafts, some correct and some not."""
    bundle = load_bundle(request.getfixturevalue(attention))
    prompt = prompt_of(bundle.manifest.vocabulary, [1, 2, 3, 4, 5, 6] * 2, bundle.typecode)
    most = bundle.context - len(prompt) - 1
    wanted = replace(ask(max_tokens=most), prompt=prompt, sampling=sampling)
    plain = await generate(start(bundle), wanted)
    drafted = await generate(start(bundle, draft_tokens=5), wanted)
    assert drafted == replace(plain, ending=drafted.ending)
    assert drafted.ending.generated == plain.ending.generated  # type: ignore[union-attr]


async def test_text_that_repeats_itself_takes_fewer_passes(text: Bundle, start: Start) -> None:
    model = start(text, draft_tokens=6)
    content = b"the cat the cat the cat the cat the cat the cat the cat the cat the cat "
    output = content * 2
    passes, runtime = 0, model.engine.runtime
    run = runtime.prefill

    def wants(row: int, tokens: Any, position: int, length: int, logits: bool = False) -> Any:
        nonlocal passes
        passes += 1
        out = np.zeros_like(run(row, tokens, position, length, logits))
        for index in range(len(out)):
            out[index, output[position + index]] = 1e4
        return out

    runtime.prefill = wants  # type: ignore[method-assign]
    outcome = await generate(model, ask(max_tokens=90))
    assert outcome.text == output[:90].decode()
    assert passes < 45


async def test_a_second_stream_ends_the_drafts_and_changes_nothing(
    text: Bundle, start: Start
) -> None:
    """Also in the middle of a wrong draft."""
    wanted = [ask(b"abcabcabcabc", 60, seed=seed) for seed in range(4)]
    plain = [await generate(start(text), each) for each in wanted]
    model = start(text, draft_tokens=7)
    first = model.submit(wanted[0])
    reading = [asyncio.create_task(read(model, first))]
    for each in wanted[1:]:
        await asyncio.sleep(0.01)
        reading.append(asyncio.create_task(generate(model, each)))
    outcomes = await asyncio.wait_for(asyncio.gather(*reading), LIMIT_S)
    assert [outcome.tokens for outcome in outcomes] == [outcome.tokens for outcome in plain]


async def test_a_stop_string_is_met_within_a_draft(text: Bundle, start: Start) -> None:
    wanted = ask(b"abcabcabcabc", 60, sampling=SamplingParameters(temperature=0))
    plain = (await generate(start(text), wanted)).text
    stopped = replace(wanted, stop=(plain[20:24],))
    plain = await generate(start(text), stopped)
    drafted = await generate(start(text, draft_tokens=8), stopped)
    assert (drafted.tokens, drafted.text) == (plain.tokens, plain.text)
    assert drafted.ending.reason is FinishReason.STOP  # type: ignore[union-attr]


async def test_a_stream_with_drafts_is_paused_and_continues(text: Bundle, start: Start) -> None:
    wanted = ask(b"abcabcabcabc", 70, seed=2, sampling=SamplingParameters(temperature=0))
    plain = await generate(start(text), wanted)
    model = start(text, draft_tokens=7, stream_buffer=4)
    stream = model.submit(wanted)
    await until(lambda: model.engine.placement.paused == [stream])
    assert (await read(model, stream)).tokens == plain.tokens


def test_drafts_are_off_by_default() -> None:
    assert EngineConfig().draft_tokens == 0
