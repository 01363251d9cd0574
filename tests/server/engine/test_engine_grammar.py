"""Streams with a grammar, through a whole engine, drawn by models of random weights."""

from __future__ import annotations

import asyncio
import json
import re
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from server.bundles.bundle import Bundle, load_bundle
from server.checkpoint import Checkpoint, Finish, FinishReason
from server.errors import InvalidRequest
from server.request import Lease, LogitsProcessors, Request, SamplingParameters, prompt_of
from tests.bundles import make_text_bundle
from tests.server.engines import DrivenModel, Gate, Outcome, ask, generate, read, script, together
from tests.server.schemas import SCHEMAS
from tests.server.tokenizer_bundles import make_tokenizer_bundle
from tests.tokenizers_made import KINDS

Start = Callable[..., DrivenModel]

LONG = r"[a-d]{40}(-[0-9]{1,6}){6}"


def with_grammar(bundle: Bundle, kind: str, *texts: str, **fields: Any) -> SamplingParameters:
    """How a stream draws whose output is of this kind."""
    grammar = bundle.grammars.compiled(kind, texts)
    return SamplingParameters(**{"seed": 1, **fields}, grammar=grammar)


def asked(bundle: Bundle, sampling: SamplingParameters, **fields: Any) -> Request:
    """A request for as much as the bundle's context holds, which its end tokens end."""
    ids = bundle.codec.from_text("" if bundle.codec.is_bytewise else "Hello")
    start, tokens = bundle.codec.starts.split(ids, None)
    prompt = prompt_of(start, tokens, bundle.typecode)
    fields = {"max_tokens": bundle.context - len(prompt), "end_tokens": bundle.end_tokens, **fields}
    return Request(prompt, sampling, **fields)


def reason_of(outcome: Outcome) -> FinishReason:
    """Why the stream ended."""
    assert isinstance(outcome.ending, Finish), outcome.ending
    return outcome.ending.reason


@pytest.fixture(scope="session")
def wide_text(tiny_bundles: Path) -> Bundle:
    """As `tiny-text`, with a context of 4096 tokens."""
    return load_bundle(make_text_bundle(tiny_bundles / "wide-text", context=4096))


@pytest.mark.parametrize("name", SCHEMAS)
async def test_every_output_is_what_the_schema_describes(
    wide_text: Bundle, start: Start, name: str
) -> None:
    model, schema = start(wide_text, slots=4), SCHEMAS[name]
    sampling = with_grammar(wide_text, "json_schema", json.dumps(schema))
    requests = [asked(wide_text, replace(sampling, output=output)) for output in range(4)]
    streams = model.submit_together(requests)
    check = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    for outcome in await asyncio.gather(*(read(model, stream) for stream in streams)):
        assert reason_of(outcome) is FinishReason.END
        check.validate(json.loads(outcome.text))


async def test_any_object_is_one(wide_text: Bundle, start: Start) -> None:
    short = LogitsProcessors(bias=((ord('"'), 4.0), (ord("}"), 2.0)))
    sampling = with_grammar(wide_text, "json_object", processors=short)
    model = start(wide_text, slots=4)
    requests = [asked(wide_text, replace(sampling, output=output)) for output in range(4)]
    streams = model.submit_together(requests)
    for outcome in await asyncio.gather(*(read(model, stream) for stream in streams)):
        assert reason_of(outcome) is FinishReason.END
        assert isinstance(json.loads(outcome.text), dict)


@pytest.mark.parametrize("kind", KINDS)
async def test_pieces_of_text_follow_it_too(tmp_path: Path, start: Start, kind: str) -> None:
    """Where the model may end, its end token ends it, and nowhere else."""
    bundle = load_bundle(make_tokenizer_bundle(tmp_path / "bundle", kind, end_tokens=[2]))
    model = start(bundle, slots=4)
    for expression in (LONG[:9], "(ja|nein)( doch)?", "[a-z ]{1,20}"):
        sampling = with_grammar(bundle, "regex", expression)
        requests = [asked(bundle, replace(sampling, output=output)) for output in range(4)]
        streams = model.submit_together(requests)
        for outcome in await asyncio.gather(*(read(model, stream) for stream in streams)):
            assert reason_of(outcome) is FinishReason.END
            assert re.fullmatch(expression, outcome.text), outcome


async def test_an_end_token_is_drawn_only_where_the_grammar_may_end(
    text: Bundle, start: Start
) -> None:
    model = start(text)
    script(model, [*b"ab", 0, 0, 0, *bytes(90)])
    outcome = await generate(model, asked(text, with_grammar(text, "regex", "abc?", temperature=0)))
    assert (outcome.text, reason_of(outcome)) == ("ab", FinishReason.END)
    outcome = await generate(model, asked(text, with_grammar(text, "regex", "abcd", temperature=0)))
    assert (outcome.text, reason_of(outcome)) == ("abcd", FinishReason.END)


async def test_an_end_token_that_is_ignored_is_not_drawn(text: Bundle, start: Start) -> None:
    model = start(text)
    script(model, bytes(96))
    sampling = with_grammar(text, "regex", "a+", temperature=0)
    outcome = await generate(model, asked(text, sampling, end_tokens=frozenset(), max_tokens=9))
    assert (outcome.text, reason_of(outcome)) == ("a" * 9, FinishReason.MAX_TOKENS)


async def test_what_is_complete_ends_before_min_tokens(text: Bundle, start: Start) -> None:
    processors = LogitsProcessors(min_tokens=9, withheld=(0,))
    sampling = with_grammar(text, "choice", "ab", processors=processors)
    outcome = await generate(start(text), asked(text, sampling, min_tokens=9))
    assert (outcome.text, reason_of(outcome)) == ("ab", FinishReason.END)


async def test_a_stop_string_may_cut_it(text: Bundle, start: Start) -> None:
    sampling = with_grammar(text, "choice", "one, two")
    outcome = await generate(start(text), asked(text, sampling, stop=(", ",)))
    assert (outcome.text, reason_of(outcome)) == ("one", FinishReason.STOP)


async def test_nothing_is_left_if_other_rules_forbid_what_it_needs(
    text: Bundle, start: Start
) -> None:
    sampling = with_grammar(text, "choice", "xy", processors=LogitsProcessors(allowed=(*b"xz",)))
    outcome = await generate(start(text), asked(text, sampling))
    assert isinstance(outcome.ending, InvalidRequest)
    assert outcome.text == "x" and "leave no token for position 1" in outcome.ending.message


async def test_log_probabilities_are_the_models_own(text: Bundle, start: Start) -> None:
    """As for all that changes what is drawn: they do not become 0 where one token is left."""
    model = start(text)
    sampling = with_grammar(text, "choice", "xyz", logprobs=2)
    stream = model.submit(asked(text, sampling))
    reported = []
    async for event in model.events(stream):
        reported += getattr(event, "logprobs", ())
    assert len(reported) == 3 and all(each.logprob < -1 for each in reported)


async def test_it_is_the_same_in_any_company_parked_and_drafted(text: Bundle, start: Start) -> None:
    sampling = with_grammar(text, "regex", LONG)
    alone = await generate(start(text), asked(text, sampling))
    assert re.fullmatch(LONG, alone.text)

    slow = start(text, slots=2, stream_buffer=4)  # it is parked whenever its reader lags
    with together(slow):
        streams = [slow.submit(ask(seed=seed, max_tokens=60)) for seed in (7, 8)]
        watched = slow.submit(asked(text, sampling, priority=1))
    async with asyncio.TaskGroup() as group:
        others = [group.create_task(read(slow, stream)) for stream in streams]
        mine = group.create_task(read(slow, watched))
    assert mine.result() == replace(alone, ending=mine.result().ending)
    assert all(reason_of(other.result()) is FinishReason.MAX_TOKENS for other in others)

    drafting = start(text, draft_tokens=4)
    assert (await generate(drafting, asked(text, sampling))).tokens == alone.tokens


@pytest.mark.parametrize("drawn", [1, 17, 45])
async def test_it_goes_on_from_its_tokens(text: Bundle, start: Start, drawn: int) -> None:
    """As after a fork, and on another server: with a state or without, and both."""
    sampling = with_grammar(text, "regex", LONG)
    request = asked(text, sampling)
    whole = await generate(start(text), request)
    model = start(text)
    with Gate(model) as gate:
        stream = model.open(Lease("first", (request,))).streams[0]
        gate.let(drawn)
        while stream.generated < drawn:
            await asyncio.sleep(0.001)
        await gate.held("step")
        saved = model.engine.placement.save(stream)
        model.cancel(stream)
    tokens = array(text.typecode, whole.tokens)
    for checkpoint in (
        Checkpoint(tokens[:drawn], saved),
        Checkpoint(tokens[:drawn]),
        Checkpoint(tokens[: drawn + 5], saved),
    ):
        again = start(text)
        resumed = again.open(Lease("again", (request,)), [checkpoint]).streams[0]
        assert (await read(again, resumed)).tokens == whole.tokens


async def test_outputs_of_one_request_go_their_own_ways(text: Bundle, start: Start) -> None:
    model, sampling = start(text, slots=4), with_grammar(text, "regex", "[a-z]{12}")
    requests = [asked(text, replace(sampling, output=output)) for output in range(4)]
    streams = model.submit_together(requests)
    outcomes = await asyncio.gather(*(read(model, stream) for stream in streams))
    assert len({outcome.text for outcome in outcomes}) == 4
    assert all(re.fullmatch("[a-z]{12}", outcome.text) for outcome in outcomes)


async def test_tokens_that_it_does_not_allow_end_the_stream(text: Bundle, start: Start) -> None:
    """A reader says which tokens it has: these may be others than the grammar allows."""
    request = asked(text, with_grammar(text, "regex", "[a-d]{40}"))
    model = start(text)
    checkpoint = Checkpoint(array(text.typecode, b"abx"))
    stream = model.open(Lease("bad", (request,)), [checkpoint]).streams[0]
    outcome = await read(model, stream)
    assert isinstance(outcome.ending, InvalidRequest)
    assert outcome.ending.field == "sampling.grammar"


async def test_a_grammar_with_too_many_ways_to_go_on_ends_alone(text: Bundle, start: Start) -> None:
    model = start(text, slots=2)
    hostile = with_grammar(text, "regex", "((a{1,100}){1,100}){1,100}")
    with together(model):
        bad = model.submit(asked(text, hostile))
        good = model.submit(ask(max_tokens=40))
    ended, other = await asyncio.gather(read(model, bad), read(model, good))
    assert reason_of(other) is FinishReason.MAX_TOKENS
    assert isinstance(ended.ending, InvalidRequest)
    assert "beyond position" in ended.ending.message
