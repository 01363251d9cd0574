"""Streams whose tokens are pieces of text keep every promise, also where a character is torn."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from concertina.codecs.token_text import TextDecoder
from concertina.v1 import generation_service_pb2 as pb
from server.bundles.bundle import Bundle, load_bundle
from server.config import EngineConfig
from server.errors import InvalidRequest, Overloaded
from tests.checkpoints import in_few_bits
from tests.pretrained_bundles import FOLDED_LLAMA, LLAMA, make_pretrained_bundle
from tests.server.api.test_sessions import Caller, paused
from tests.server.engines import LIMIT_S, Gate
from tests.server.replicas import Replica
from tests.server.sessions.test_registry import Cluster, Received, read, request, whole
from tests.server.tokenizer_bundles import make_tokenizer_bundle
from tests.tokenizers_made import BYTE_FALLBACK, BYTE_LEVEL, trained

PROMPT, SIZE = 9, 40
_BYTES = "ñ字a".encode()


@pytest.fixture(scope="module", params=["pieces", LLAMA, FOLDED_LLAMA, f"{FOLDED_LLAMA} state8"])
def bundle(request: pytest.FixtureRequest, tiny_bundles: Path) -> Bundle:
    """One that folds, with byte fallback, and pretrained ones of byte-level tokens."""
    kind, _, bits = request.param.partition(" ")
    if kind in (LLAMA, FOLDED_LLAMA):
        return load_bundle(in_few_bits(make_pretrained_bundle(tiny_bundles, kind), bits))
    begin = trained(BYTE_FALLBACK).token_to_id("<s>")
    return load_bundle(
        make_tokenizer_bundle(tiny_bundles / "pieces", BYTE_FALLBACK, begin_token=begin)
    )


@pytest.fixture
async def cluster(bundle: Bundle, tmp_path: Path) -> AsyncIterator[Cluster]:
    """Starts replicas of the bundle that share a store."""
    replicas: list[Replica] = []

    def start(**settings: Any) -> Replica:
        config = EngineConfig(threads=1, **{"snapshot_interval": 8, "slots": 4, **settings})
        replicas.append(Replica(bundle, config, f"file://{tmp_path}/store"))
        return replicas[-1]

    yield start
    for replica in replicas:
        replica.close()


def torn(bundle: Bundle, max_tokens: int = SIZE, **fields: Any) -> pb.GenerateRequest:
    """A request for tokens of one byte each, most of them parts of characters."""
    pieces = bundle.codec.text.pieces
    allowed = [n for n, piece in enumerate(pieces) if len(piece) == 1 and piece in _BYTES]
    assert len(allowed) >= len(_BYTES)
    sampling = {"seed": 3, "repetition_penalty": 1.1, "allowed_token_ids": allowed}
    kind = BYTE_LEVEL if "llama" in bundle.name else BYTE_FALLBACK
    said = trained(kind).encode("the quick brown fox jumps", add_special_tokens=False).ids
    prompt = {"tokens": {"ids": (3 * said)[:PROMPT]}}
    return request(max_tokens, prompt=prompt, sampling=sampling, **fields)


def received(bundle: Bundle, expected: Received, tokens: int, stream_id: str) -> Received:
    """What a reader of the first `tokens` has."""
    decoder = TextDecoder(bundle.codec.text, is_beginning=False)
    ids = expected.ids[0][:tokens]
    text = "".join([decoder.push(token) for token in ids])
    assert expected.texts[0].startswith(text)
    return Received(stream_id, 2, ids={0: ids}, texts={0: text})


def torn_places(bundle: Bundle, expected: Received) -> list[int]:
    """After how many tokens a character is torn."""
    decoder, found = TextDecoder(bundle.codec.text, is_beginning=False), []
    for count, token in enumerate(expected.ids[0], start=1):
        if not decoder.push(token) and bundle.codec.text.pieces[token]:
            found.append(count)
    return found


async def killed(first: Replica, wanted: pb.GenerateRequest, passes: int) -> str:
    """Starts a stream whose process is killed after so many passes of the model."""
    with Gate(first.model) as gate:
        attachment = await first.start(wanted)
        gate.let(passes)
        await gate.held("step")
        assert first.snapshots.flush(LIMIT_S) == 0
        first.die()
        gate.let(float("inf"))
    first.kill()
    return attachment.session.lease.stream_id


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("which", [0, 1, -1])
async def test_a_stream_goes_on_where_a_character_is_torn(
    cluster: Cluster, bundle: Bundle, which: int, ids: bool
) -> None:
    """The process dies; its reader comes to another one with a part of a character."""
    wanted, last = torn(bundle), cluster()
    expected = await whole(last, wanted, PROMPT)
    assert len(expected.ids[0]) == SIZE
    places = [place for place in torn_places(bundle, expected) if place < 30]
    stream_id = await killed(cluster(), wanted, 30)
    got = received(bundle, expected, places[which], stream_id)
    await read(await last.resume(stream_id, "", got.cursors(1, ids)), got, PROMPT)
    assert (got.ids, got.texts) == (expected.ids, expected.texts)
    assert got.endings[0].reason == expected.endings[0].reason


async def test_every_output_goes_on(cluster: Cluster, bundle: Bundle) -> None:
    """Also with log-probabilities of the prompt and of the tokens."""
    wanted = torn(bundle, output={"n": 3, "logprobs": 2, "prompt_logprobs": 1})
    last = cluster()
    expected = await whole(last, wanted, PROMPT)
    assert len(expected.prompt) == PROMPT
    assert len({tuple(ids) for ids in expected.ids.values()}) == 3
    first, got = cluster(), Received()
    await read(await first.start(wanted), got, PROMPT, 7)
    first.kill()
    second = cluster()
    await read(await second.resume(got.stream_id, "", got.cursors(3)), got, PROMPT, 9)
    second.kill()
    await read(await last.resume(got.stream_id, "", got.cursors(3, ids=True)), got, PROMPT)
    assert got.content == expected.content


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_pause_changes_no_text(cluster: Cluster, bundle: Bundle, elsewhere: bool) -> None:
    wanted, last = torn(bundle, 80), Caller(cluster())
    expected = await whole(last.sessions, wanted, PROMPT)
    first = Caller(cluster())
    got = await paused(first, wanted, 21)
    if elsewhere:
        first.sessions.kill()
        first = last
    then = await first.continue_session(got, PROMPT + len(got.ids[0]))
    assert got.ids[0] + then.ids[0] == expected.ids[0]
    assert got.texts[0] + then.texts[0] == expected.texts[0]


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_session_goes_on_with_more_text(
    cluster: Cluster, bundle: Bundle, elsewhere: bool
) -> None:
    """Its tokens are those of a request whose prompt has all of them, and so is its text."""
    caller = Caller(cluster())
    got = await caller.generate(torn(bundle, 20))
    if elsewhere:
        caller.sessions.kill()
        caller = Caller(cluster())
    more = [*bundle.codec.from_text(" the lazy dog").tolist()]
    begin = bundle.codec.starts.begin  # type: ignore[attr-defined]
    more = more[1:] if more[0] == begin else more
    past = [*torn(bundle).prompt.tokens.ids, *got.ids[0], *more]
    options = {"sampling": {"seed": 8}, "stopping": {"max_tokens": 15, "ignore_eos": True}}
    then = await caller.continue_session(
        got, len(past), prompt={"text": " the lazy dog"}, **options
    )
    fresh = pb.GenerateRequest(prompt={"tokens": {"ids": past}}, keep={"seconds": 60}, **options)
    direct = await whole(caller.sessions, fresh, len(past))
    assert len(then.ids[0]) == 15
    assert (then.ids, then.texts) == (direct.ids, direct.texts)


async def test_forks_share_the_past(cluster: Cluster, bundle: Bundle) -> None:
    caller = Caller(cluster())
    got = await caller.generate(torn(bundle, 30))
    forked = (await caller.call("Fork", stream_id=got.stream_id, n=2)).stream_ids
    model = caller.sessions.model
    states = [model.find(name, "").streams[0].saved for name in (got.stream_id, *forked)]  # type: ignore[union-attr]
    assert all(state is states[0] for state in states)
    outcomes = [
        await caller.continue_session(Received(name), PROMPT + 30, stopping={"max_tokens": 20})
        for name in forked
    ]
    assert len({tuple(each.ids[0]) for each in outcomes}) == 2
    caller.sessions.kill()
    second, again = Caller(cluster()), Received(forked[0], 1)
    await read(await second.sessions.resume(forked[0], "", again.cursors(1)), again, PROMPT + 30)
    assert (again.ids, again.texts) == (outcomes[0].ids, outcomes[0].texts)


async def test_streams_are_admitted_by_what_their_state_may_take(
    cluster: Cluster, bundle: Bundle
) -> None:
    """Where layers are full, state grows with each token, so that a short stream still fits."""
    wanted = torn(bundle, SIZE)
    one = bundle.peak_state_bytes(PROMPT + SIZE)
    lists = 8 * len(wanted.sampling.allowed_token_ids) + 1024
    sessions = cluster(state_limit_bytes=one + one // 2 + lists)
    with Gate(sessions.model) as gate:
        running = await sessions.start(wanted)
        assert sessions.model.engine.ledger.held.state_bytes >= one
        with pytest.raises(Overloaded, match="bytes of state are taken and the request adds"):
            await sessions.start(wanted)
        short = torn(bundle, 2)
        if "llama" in bundle.name:
            assert bundle.peak_state_bytes(PROMPT + 2) < one // 3
            others = [await sessions.start(short)]
        else:
            others = []
        gate.let(float("inf"))
        for each in (running, *others):
            await read(each, Received(), PROMPT)
    await sessions.start(wanted)
    with pytest.raises(InvalidRequest, match=r"at most .* are admitted: lower max_tokens"):
        await cluster(state_limit_bytes=one - 1).start(wanted)
