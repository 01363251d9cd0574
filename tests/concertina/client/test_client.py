"""The blocking and the asyncio client against a server that keeps, and breaks, the contract."""

from __future__ import annotations

import asyncio
import io
import socket
import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from PIL import Image

from concertina.client import (
    Accepted,
    AsyncClient,
    Client,
    ConcertinaError,
    ContractViolation,
    DeadlineExceeded,
    Event,
    Finished,
    FinishReason,
    GenerationFailed,
    ImageFormat,
    InvalidRequest,
    ModelNotFound,
    Output,
    Overloaded,
    PromptLogprobs,
    Sampling,
    ServerError,
    ServerUnavailable,
    Stopping,
    StreamCut,
    TokenLogprobs,
    Tokens,
    Usage,
)
from concertina.v1 import generation_service_pb2 as pb
from tests.concertina.conftest import PALETTE, WAIT, Fake, Status

Collect = Callable[..., list[Event]]


def _blocking(address: str, *arguments: Any, **parameters: Any) -> list[Event]:
    parameters = {"keep": 0, **parameters}  # test_resuming.py has those that are kept
    with Client(address) as client, client.generate(*arguments, **parameters) as stream:
        return list(stream)


def _asyncio(address: str, *arguments: Any, **parameters: Any) -> list[Event]:
    parameters = {"keep": 0, **parameters}

    async def collect() -> list[Event]:
        async with (
            AsyncClient(address) as client,
            client.generate(*arguments, **parameters) as stream,
        ):
            return [event async for event in stream]

    return asyncio.run(asyncio.wait_for(collect(), WAIT))


@pytest.fixture(params=[_blocking, _asyncio], ids=["blocking", "asyncio"])
def collect(request: pytest.FixtureRequest) -> Collect:
    """Runs one stream to its end with one of the two clients and returns its events."""
    return request.param


def test_events_are_typed_and_complete(fake: Fake, collect: Collect) -> None:
    fake.script = [
        fake.accepted(prompt_tokens=2),
        fake.text(2, 2, "ab"),
        fake.text(3, 4, "c"),
        fake.finished(4, pb.FINISH_REASON_STOP),
    ]
    assert collect(fake.address, "xy") == [
        Accepted(
            sequence=1,
            stream_id="s1",
            model="prose",
            fingerprint="f0",
            sampling=Sampling(
                temperature=0.8,
                top_k=5,
                top_p=0.9,
                min_p=0,
                typical_p=0.7,
                repetition_penalty=1.1,
                presence_penalty=-0.3,
                frequency_penalty=0.6,
                logit_bias={9: 0.2},
                allowed_token_ids=(9, 10),
                bad_words=("no",),
                seed=7,
            ),
            stopping=Stopping(
                max_tokens=9,
                min_tokens=2,
                stop=("\n",),
                stop_token_ids=(3,),
                include_stop=True,
                ignore_eos=False,
                time_limit=None,
            ),
            prompt_tokens=2,
            output=Output(n=1, logprobs=0, prompt_logprobs=None, stream_interval=4),
            priority=7,
        ),
        Tokens(sequence=2, first_position=2, ids=(97, 98), text="ab", rgb=b""),
        Tokens(sequence=3, first_position=4, ids=(99,), text="c", rgb=b""),
        Finished(
            sequence=4,
            reason=FinishReason.STOP,
            stop="\n",
            usage=Usage(
                prompt_tokens=0,
                generated_tokens=9,
                queue_time=0,
                time_to_first_token=0.25,
                total_time=1.5,
                state_bytes=4096,
            ),
        ),
    ]


def _prompt(sequence: int, first_position: int, *logprobs: float) -> pb.GenerateResponse:
    told = [pb.TokenLogprobs(logprob=x, top_ids=[7], top_logprobs=[-0.5]) for x in logprobs]
    message = pb.PromptLogprobs(first_position=first_position, logprobs=told)
    return pb.GenerateResponse(sequence=sequence, prompt_logprobs=message)


def test_outputs_come_side_by_side(fake: Fake, collect: Collect) -> None:
    fake.script = [
        fake.accepted(outputs=2),
        fake.text(2, 0, "a", output=1),
        fake.text(3, 0, "bc"),
        fake.finished(4, output=1),
        fake.text(5, 2, "d"),
        fake.finished(6, pb.FINISH_REASON_STOP),
    ]
    accepted, *events = collect(fake.address, n=2)
    assert isinstance(accepted, Accepted)
    assert accepted.output.n == 2
    seen = [(type(e), e.output) for e in events if isinstance(e, Tokens | Finished)]
    assert seen == [(Tokens, 1), (Tokens, 0), (Finished, 1), (Tokens, 0), (Finished, 0)]


def test_an_output_without_its_terminal_event_was_cut(fake: Fake, collect: Collect) -> None:
    fake.script = [fake.accepted(outputs=2), fake.finished(2, output=1)]
    with pytest.raises(StreamCut):
        collect(fake.address, n=2)


def test_logprobs_are_told_of_prompt_and_tokens(fake: Fake, collect: Collect) -> None:
    said = pb.TokenLogprobs(
        logprob=-1.5,
        top_ids=[3, 9],
        top_logprobs=[-0.25, -2],
        token="\ufffd",
        piece=b"\xe2",
        top_tokens=["<|end|>", "\ufffd"],
        top_pieces=[b"", b"\xe2"],
    )
    tokens = pb.Tokens(first_position=3, ids=[9], logprobs=[said])
    fake.script = [
        fake.accepted(prompt_tokens=3),
        _prompt(2, 0, -1.0, -2.0),
        _prompt(3, 2, -3.0),
        pb.GenerateResponse(sequence=4, tokens=tokens),
        fake.finished(5),
    ]
    _, first, second, delta, _ = collect(fake.address)
    like = [TokenLogprobs(logprob, (7,), (-0.5,)) for logprob in (-1.0, -2.0, -3.0)]
    assert first == PromptLogprobs(2, 0, (like[0], like[1]))
    assert second == PromptLogprobs(3, 2, (like[2],))
    assert isinstance(delta, Tokens)
    strings = ("\ufffd", b"\xe2", ("<|end|>", "\ufffd"), (b"", b"\xe2"))
    assert delta.logprobs == (TokenLogprobs(-1.5, (3, 9), (-0.25, -2.0), *strings),)


def test_events_arrive_while_the_stream_runs(fake: Fake) -> None:
    gate = threading.Event()
    fake.script = [fake.accepted(), gate, fake.text(2, 0, "a"), fake.finished(3)]
    with Client(fake.address) as client, client.generate() as stream:
        assert isinstance(next(stream), Accepted)
        gate.set()
        assert [type(event) for event in stream] == [Tokens, Finished]


def test_every_parameter_reaches_the_wire(fake: Fake, collect: Collect) -> None:
    fake.script = [fake.accepted(), fake.finished(2)]
    collect(
        fake.address,
        "def ",
        model="prose",
        label="python",
        temperature=0.5,
        top_k=0,
        top_p=0.25,
        min_p=0.125,
        typical_p=0.75,
        repetition_penalty=1.25,
        presence_penalty=0,
        frequency_penalty=-0.5,
        logit_bias={0: 1, 255: -2.5},
        allowed_token_ids=range(3),
        bad_words=["é"],
        seed=2**64 - 1,
        max_tokens=10,
        min_tokens=2,
        stop="\n\n",
        stop_token_ids=[0, 1],
        include_stop=True,
        ignore_eos=True,
        time_limit=1.5,
        n=1,
        logprobs=0,
        prompt_logprobs=3,
        stream_interval=4,
        priority=-3,
    )
    expected = pb.GenerateRequest(
        model="prose",
        prompt=pb.Prompt(text="def ", label="python"),
        sampling=pb.SamplingParameters(
            temperature=0.5,
            top_k=0,
            top_p=0.25,
            min_p=0.125,
            typical_p=0.75,
            repetition_penalty=1.25,
            presence_penalty=0,
            frequency_penalty=-0.5,
            logit_bias={0: 1, 255: -2.5},
            allowed_token_ids=[0, 1, 2],
            bad_words=["é"],
            seed=2**64 - 1,
        ),
        stopping=pb.StoppingCriteria(
            max_tokens=10,
            min_tokens=2,
            stop=["\n\n"],
            stop_token_ids=[0, 1],
            include_stop=True,
            ignore_eos=True,
        ),
        output=pb.OutputOptions(n=1, logprobs=0, prompt_logprobs=3, stream_interval=4),
        priority=-3,
    )
    expected.stopping.time_limit.FromMilliseconds(1500)
    assert fake.requests == [expected]
    assert fake.requests[0].sampling.HasField("top_k")


def test_what_is_not_given_is_left_to_the_server(fake: Fake, collect: Collect) -> None:
    fake.script = [fake.accepted(), fake.finished(2)]
    collect(fake.address)
    (request,) = fake.requests
    assert not request.HasField("prompt")
    assert not request.sampling.ListFields()
    assert not request.stopping.ListFields()
    assert not request.output.ListFields()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("é", pb.Prompt(text="é")),
        ([1, 2], pb.Prompt(tokens=pb.TokenIds(ids=[1, 2]))),
        (range(3), pb.Prompt(tokens=pb.TokenIds(ids=[0, 1, 2]))),
        (b"\x89PNG\r\n\x1a\n...", pb.Prompt(image=pb.ImageRows(png=b"\x89PNG\r\n\x1a\n..."))),
        (b"\x00\x01\x02", pb.Prompt(image=pb.ImageRows(rgb=b"\x00\x01\x02"))),
    ],
)
def test_prompts_of_every_form(fake: Fake, prompt: Any, expected: pb.Prompt) -> None:
    with Client(fake.address) as client:
        client.score(prompt)
    assert fake.requests[0].prompt == expected


def test_a_pillow_image_is_sent_as_png(fake: Fake) -> None:
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 128))
    with Client(fake.address) as client:
        client.score(image, label="Food & Drink")
    prompt = fake.requests[0].prompt
    assert prompt.label == "Food & Drink"
    sent = Image.open(io.BytesIO(prompt.image.png))
    assert (sent.size, sent.mode, sent.tobytes()) == ((4, 2), "RGBA", image.tobytes())


@pytest.mark.parametrize("orientation", [None, 0, 1, 3, 6, 9])
def test_the_orientation_of_an_image_goes_with_it(fake: Fake, orientation: int | None) -> None:
    image = Image.new("RGB", (4, 2), "red")
    if orientation is not None:
        image.getexif()[0x0112] = orientation
    image.getexif()[0x010F] = "a maker, who is nobody's business"
    with Client(fake.address) as client:
        client.score(image)
    sent = Image.open(io.BytesIO(fake.requests[0].prompt.image.png))
    assert dict(sent.getexif()) == ({0x0112: orientation} if orientation in {3, 6} else {})


def test_an_image_that_png_cannot_hold_is_refused(fake: Fake) -> None:
    with Client(fake.address) as client, pytest.raises(InvalidRequest) as caught:
        client.score(Image.new("F", (4, 2)))
    assert "cannot be sent as PNG (cannot write mode F as PNG)" in str(caught.value)
    assert 'image.convert("RGB")' in str(caught.value)
    assert not fake.requests


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"seed": -1}, "seed"),
        ({"top_k": 1.5}, "top_k"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop": [1]}, "stop"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias"),
        ({"allowed_token_ids": [1 << 32]}, "allowed_token_ids"),
        ({"n": -1}, "n is -1; it must be between 1 and 128"),
        ({"time_limit": float("nan")}, "time_limit"),
        ({"time_limit": 1e300}, "time_limit"),
        ({"prompt": [2**40]}, "ids"),
        ({"prompt": 5}, "int"),
    ],
)
def test_a_value_the_wire_cannot_carry_is_named(parameters: Any, named: str) -> None:
    with Client() as client, pytest.raises(InvalidRequest, match=named):
        client.generate(**parameters)


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ([Fake.accepted(), Fake.text(3, 0, "a")], "event 3 follows event 1, 2 was expected"),
        (
            [Fake.accepted(), Fake.text(2, 0, "a"), Fake.text(2, 1, "b")],
            "event 2 follows event 2, 3 was expected",
        ),
        ([Fake.accepted(2)], "event 2 follows event 0"),
        ([Fake.text(1, 0, "a")], "event 1 is `tokens`"),
        ([Fake.finished(1)], "event 1 is `finished`"),
        ([Fake.accepted(), Fake.accepted(2)], "event 2 is `accepted`"),
        ([Fake.accepted(), Fake.text(2, 1, "a")], "starts at position 1, 0 was expected"),
        (
            [Fake.accepted(), Fake.text(2, 0, "ab"), Fake.text(3, 1, "b")],
            "starts at position 1, 2 was expected",
        ),
        ([Fake.accepted(), Fake.finished(2), Fake.finished(3)], "follows the terminal event"),
        ([Fake.accepted(), Fake.finished(2), Fake.text(3, 0, "a")], "follows the terminal event"),
        (
            [Fake.accepted(), pb.GenerateResponse(sequence=2)],
            "a kind that this client does not know",
        ),
        ([Fake.accepted(), Fake.text(2, 0, "a", output=1)], "of output 1, 1 were expected"),
        ([Fake.accepted(outputs=2), Fake.finished(2, output=2)], "of output 2, 2 were expected"),
        (
            [Fake.accepted(outputs=2), Fake.finished(2, output=1), Fake.text(3, 0, "a", output=1)],
            "`tokens` follows the terminal event of output 1",
        ),
        (
            [Fake.accepted(outputs=2), Fake.text(2, 0, "a", output=1), Fake.text(3, 1, "a")],
            "starts at position 1, 0 was expected",
        ),
        ([Fake.accepted(), _prompt(2, 1, -1.0)], "starts at position 1, 0 was expected"),
        (
            [Fake.accepted(), _prompt(2, 0, -1.0, -2.0), _prompt(3, 0, -1.0)],
            "starts at position 0, 2 was expected",
        ),
        (
            [
                Fake.accepted(),
                pb.GenerateResponse(sequence=2, tokens=pb.Tokens(ids=[1], rgb=b"\x00")),
            ],
            "1 bytes of colour for 1 tokens",
        ),
    ],
)
def test_a_broken_contract_is_an_error(
    fake: Fake, collect: Collect, script: list[Any], complaint: str
) -> None:
    fake.script = [*script, fake.never]
    with pytest.raises(ContractViolation, match=complaint):
        collect(fake.address)
    assert fake.cancelled.wait(WAIT)


def test_a_broken_stream_is_left_at_once(fake: Fake) -> None:
    fake.script = [fake.accepted(), fake.text(3, 0, "a"), fake.text(4, 1, "b"), fake.never]
    with Client(fake.address) as client:
        stream = client.generate()
        with pytest.raises(ContractViolation):
            list(stream)
        assert list(stream) == []
        assert fake.cancelled.wait(WAIT)


async def test_a_broken_async_stream_is_left_at_once(fake: Fake) -> None:
    fake.script = [fake.accepted(), fake.text(3, 0, "a"), fake.text(4, 1, "b"), fake.never]
    async with asyncio.timeout(WAIT), AsyncClient(fake.address) as client:
        stream = client.generate()
        with pytest.raises(ContractViolation):
            [event async for event in stream]
        assert [event async for event in stream] == []
        assert await asyncio.to_thread(fake.cancelled.wait, WAIT)


def test_a_stream_without_a_terminal_event_was_cut(fake: Fake, collect: Collect) -> None:
    fake.script = [fake.accepted(), fake.text(2, 0, "a")]
    with pytest.raises(StreamCut, match=r"stream s1 was cut after event 2 .*status OK") as caught:
        collect(fake.address)
    assert (caught.value.stream_id, caught.value.last_sequence) == ("s1", 2)
    assert caught.value.retryable


def test_a_stream_without_any_event_was_cut(fake: Fake, collect: Collect) -> None:
    with pytest.raises(StreamCut, match=r"not accepted.*after event 0"):
        collect(fake.address)


@pytest.mark.parametrize("code", ["CANCELLED", "UNAVAILABLE", "INTERNAL", "RESOURCE_EXHAUSTED"])
def test_a_status_after_acceptance_cuts_the_stream(fake: Fake, collect: Collect, code: str) -> None:
    fake.script = [fake.accepted(), Status(grpc.StatusCode[code], "gone")]
    with pytest.raises(StreamCut, match=f"after event 1 .*{code}: gone") as caught:
        collect(fake.address)
    assert caught.value.code == code


def test_a_status_after_the_terminal_event_says_nothing(fake: Fake, collect: Collect) -> None:
    fake.script = [
        fake.accepted(),
        fake.finished(2),
        Status(grpc.StatusCode.INTERNAL, "proxy trouble"),
    ]
    assert isinstance(collect(fake.address)[-1], Finished)


def test_an_error_event_is_raised(fake: Fake, collect: Collect) -> None:
    fake.script = [fake.accepted(), fake.text(2, 0, "a"), fake.error(3), fake.never]
    with pytest.raises(GenerationFailed, match=r"^it broke$") as caught:
        collect(fake.address)
    assert (caught.value.code, caught.value.retryable) == ("INTERNAL", True)
    assert caught.value.retry_after == 2.5


def test_an_error_event_in_place_of_acceptance_is_a_refusal(fake: Fake, collect: Collect) -> None:
    fake.script = [fake.error(1, code="RESOURCE_EXHAUSTED", message="64 streams wait already")]
    with pytest.raises(Overloaded, match="64 streams") as caught:
        collect(fake.address)
    assert caught.value.retry_after == 2.5


@pytest.mark.parametrize(
    ("code", "kind", "retryable"),
    [
        ("NOT_FOUND", ModelNotFound, False),
        ("INVALID_ARGUMENT", InvalidRequest, False),
        ("RESOURCE_EXHAUSTED", Overloaded, True),
        ("UNAVAILABLE", ServerUnavailable, True),
        ("INTERNAL", ServerError, False),
        ("UNIMPLEMENTED", ServerError, False),
    ],
)
def test_a_refusal_is_raised_by_its_status(
    fake: Fake, collect: Collect, code: str, kind: type[ConcertinaError], retryable: bool
) -> None:
    fake.script = [Status(grpc.StatusCode[code], "because of this")]
    with pytest.raises(kind, match="because of this") as caught:
        collect(fake.address)
    assert type(caught.value) is kind
    assert (caught.value.code, caught.value.retryable) == (code, retryable)


def test_no_server_at_all(collect: Collect) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening: connections are refused
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            ServerUnavailable, match=f"{address}; start one with `concertina serve`"
        ):
            collect(address)


@pytest.mark.parametrize("accepted", [True, False])
def test_the_timeout_ends_the_call(fake: Fake, collect: Collect, accepted: bool) -> None:
    fake.script = [fake.accepted(), fake.never] if accepted else [fake.never]
    with pytest.raises(DeadlineExceeded, match="timeout"):
        collect(fake.address, timeout=0.2)
    assert fake.cancelled.wait(WAIT)


def test_cancel_ends_the_iteration_and_reaches_the_server(fake: Fake) -> None:
    fake.script = [fake.accepted(), fake.text(2, 0, "a"), fake.never]
    with Client(fake.address) as client:
        stream = client.generate()
        assert isinstance(next(stream), Accepted)
        stream.cancel()
        assert list(stream) == []
        assert fake.cancelled.wait(WAIT)


def test_cancel_from_another_thread_wakes_the_reader(fake: Fake) -> None:
    fake.script = [fake.accepted(), fake.never]
    with Client(fake.address) as client:
        stream = client.generate()
        next(stream)
        threading.Timer(0.1, stream.cancel).start()
        assert list(stream) == []


def test_leaving_a_stream_cancels_it(fake: Fake) -> None:
    fake.script = [fake.accepted(), fake.never]
    with Client(fake.address) as client:
        with client.generate() as stream:
            next(stream)
        assert fake.cancelled.wait(WAIT)


async def test_async_cancel_ends_the_iteration_and_reaches_the_server(fake: Fake) -> None:
    fake.script = [fake.accepted(), fake.never]
    async with asyncio.timeout(WAIT), AsyncClient(fake.address) as client:
        stream = client.generate()
        asyncio.get_running_loop().call_later(0.1, stream.cancel)
        assert [type(event) async for event in stream] == [Accepted]
        assert await asyncio.to_thread(fake.cancelled.wait, WAIT)


async def test_leaving_an_async_stream_cancels_it(fake: Fake) -> None:
    fake.script = [fake.accepted(), fake.never]
    async with asyncio.timeout(WAIT), AsyncClient(fake.address) as client:
        async with client.generate() as stream:
            await anext(aiter(stream))
        assert await asyncio.to_thread(fake.cancelled.wait, WAIT)


async def test_cancelling_the_task_is_not_swallowed(fake: Fake) -> None:
    fake.script = [fake.accepted(), fake.never]
    async with asyncio.timeout(WAIT), AsyncClient(fake.address) as client:
        stream = client.generate()

        async def read() -> None:
            async for event in stream:
                assert isinstance(event, Accepted)

        task = asyncio.create_task(read())
        await asyncio.sleep(0.1)
        stream.cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(fake.cancelled.wait, WAIT)


def test_models_and_score(fake: Fake) -> None:
    with Client(fake.address) as client:
        text, image = client.models()
        assert client.model("pictures") == image
        with pytest.raises(ModelNotFound, match="'nothing' is not served here"):
            client.model("nothing")
        score = client.score("ab", model="prose")
    assert (text.name, text.modality, text.context) == ("prose", "text", 8192)
    assert (text.metrics, text.image) == ({"bits/byte": 1.25}, None)
    assert (text.slots, text.queue_limit, text.max_state_bytes) == (16, 64, 3_000_000)
    assert (image.modality, image.labels) == ("image", ("Food & Drink",))
    assert image.image == ImageFormat(width=4, height=3, palette=PALETTE)
    assert (score.bits_per_token, score.bits, score.model) == (1.5, (1.0, 2.0), "prose")


async def test_async_models_and_score(fake: Fake) -> None:
    async with asyncio.timeout(WAIT), AsyncClient(fake.address) as client:
        with Client(fake.address) as blocking:
            assert await client.models() == blocking.models()
            assert await client.model("prose") == blocking.model("prose")
            assert await client.score("ab") == blocking.score("ab")
        with pytest.raises(ModelNotFound, match="'nothing' is not served here"):
            await client.model("nothing")


def test_refused_calls_raise_by_status(fake: Fake) -> None:
    fake.refusal = Status(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full")
    with Client(fake.address) as client:
        for call in (lambda: client.score("ab"), client.models, lambda: client.model("prose")):
            with pytest.raises(Overloaded, match="queue is full"):
                call()


async def test_refused_async_calls_raise_by_status(fake: Fake) -> None:
    fake.refusal = Status(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full")
    async with asyncio.timeout(WAIT), AsyncClient(fake.address) as client:
        for call in (client.score("ab"), client.models(), client.model("prose")):
            with pytest.raises(Overloaded, match="queue is full"):
                await call
