"""Arguments that a call does not have, or cannot use; and messages about them, which are short."""

from __future__ import annotations

import asyncio
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from concertina.client import (
    AsyncClient,
    Client,
    InvalidRequest,
    Overloaded,
    ServerError,
    StreamCut,
)
from concertina.client.statuses import status_error
from concertina.v1 import generation_service_pb2 as pb
from tests.concertina.conftest import WAIT, Fake, Status

MESSAGE_LIMIT = 4 * 1024 * 1024
SHORT = 1000

Call = Callable[..., Any]


def _blocking(address: str, call: Callable[[Any], Any]) -> Any:
    with Client(address) as client:
        return call(client)


def _asyncio(address: str, call: Callable[[Any], Any]) -> Any:
    async def run() -> Any:
        async with AsyncClient(address) as client:
            made = call(client)
            return await made if inspect.isawaitable(made) else made

    return asyncio.run(asyncio.wait_for(run(), WAIT))


@pytest.fixture(params=[_blocking, _asyncio], ids=["blocking", "asyncio"])
def using(request: pytest.FixtureRequest, fake: Fake) -> Call:
    """Calls a function with one of the two clients of a server."""
    return lambda call: request.param(fake.address, call)


CALLS: dict[str, Callable[..., Any]] = {
    "generate": lambda client, **given: client.generate("x", **given),
    "complete": lambda client, **given: client.complete("x", **given),
    "score": lambda client, **given: client.score("x", **given),
    "tokenize": lambda client, **given: client.tokenize("x", **given),
    "detokenize": lambda client, **given: client.detokenize([1], **given),
    "resume": lambda client, **given: client.resume("s", **given),
    "models": lambda client, **given: client.models(**given),
    "model": lambda client, **given: client.model(**given),
    "pause": lambda client, **given: client.sessions.pause("s", **given),
    "continue_": lambda client, **given: client.sessions.continue_("s", **given),
    "fork": lambda client, **given: client.sessions.fork("s", **given),
    "export": lambda client, **given: client.sessions.export("s", **given),
    "import_": lambda client, **given: client.sessions.import_(b"s", **given),
    "delete": lambda client, **given: client.sessions.delete("s", **given),
    "list": lambda client, **given: client.sessions.list(**given),
}


def test_every_call_is_tried_here() -> None:
    for client in (Client, AsyncClient):
        own = {name for name, value in vars(client).items() if inspect.isfunction(value)}
        assert {name for name in own if not name.startswith("_")} - {"close"} <= CALLS.keys()
    with Client() as opened:
        methods = inspect.getmembers(opened.sessions, inspect.ismethod)
    assert {name for name, _ in methods if not name.startswith("_")} <= CALLS.keys()


@pytest.mark.parametrize("call", CALLS)
def test_an_argument_that_there_is_not_is_a_type_error(using: Call, fake: Fake, call: str) -> None:
    with pytest.raises(TypeError, match=rf"{call}\(\) got an unexpected keyword argument 'tempra"):
        using(lambda client: CALLS[call](client, temprature=0))
    assert not fake.requests


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_so_it_is_where_clients_are_made(kind: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'keys'"):
        kind("127.0.0.1:9000", keys="x")


def test_the_argument_that_was_meant_is_named(using: Call) -> None:
    for given, meant in (("temprature", "temperature"), ("time_out", "timeout"), ("topk", "top_k")):
        with pytest.raises(TypeError, match=f"did you mean '{meant}'"):
            using(lambda client, given=given: client.generate(**{given: 1}))
    with pytest.raises(TypeError, match="did you mean 'max_tokens'"):
        using(lambda client: client.sessions.continue_("s", max_tokns=1))


def test_what_only_generate_has_is_none_of_continue(using: Call) -> None:
    for name in ("model", "n", "keep", "label"):
        with pytest.raises(TypeError, match=f"'{name}'"):
            using(lambda client, name=name: client.sessions.continue_("s", **{name: 1}))


@pytest.mark.parametrize("timeout", [math.nan, -1, 0, "5", None.__class__])
@pytest.mark.parametrize("call", CALLS)
def test_a_timeout_that_is_none_is_named(using: Call, call: str, timeout: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^timeout is (nan s|-1 s|0 s|not a number)"):
        using(lambda client: CALLS[call](client, timeout=timeout))


@pytest.mark.parametrize("timeout", [math.inf, 1e30, 1e10, None, 20])
def test_an_endless_timeout_is_no_timeout(using: Call, fake: Fake, timeout: Any) -> None:
    fake.script = [fake.accepted(), fake.finished(2)]
    assert len(using(lambda client: client.models(timeout=timeout))) == 2
    with Client(fake.address) as client, client.generate("x", timeout=timeout) as stream:
        assert len(list(stream)) == 2


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("resume_for", math.nan),
        ("resume_for", -1),
        ("resume_for", "5"),
        ("keep", math.nan),
        ("keep", math.inf),
        ("keep", -1),
        ("time_limit", math.inf),
        ("time_limit", "5"),
    ],
)
def test_other_times_are_checked_too(using: Call, argument: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"^(stopping\.)?{argument} is"):
        using(lambda client: client.generate("x", **{argument: value}))


def test_a_stream_may_be_tried_for_ever(using: Call) -> None:
    using(lambda client: client.generate("x", resume_for=math.inf)).cancel()


def test_what_is_too_large_to_send_is_the_callers_fault(using: Call, fake: Fake) -> None:
    large = (("x" * MESSAGE_LIMIT, "prompt.text"), ([2**31] * 1_000_000, "prompt.tokens.ids"))
    for prompt, field in large:
        for call in (
            lambda client, prompt=prompt: client.generate(prompt),
            lambda client, prompt=prompt: client.score(prompt),
        ):
            with pytest.raises(InvalidRequest, match="the limit is 4,194,304") as raised:
                using(call)
            refused = raised.value
            assert (refused.retryable, refused.field, refused.limit) == (
                False,
                field,
                MESSAGE_LIMIT,
            )
    assert not fake.requests


async def test_a_key_that_is_too_long_is_the_callers_fault() -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(InvalidRequest, match=r"key has 20,000 characters, the limit is 4,096"):
            kind(key="k" * 20_000)


@pytest.mark.parametrize(
    ("details", "kind"),
    [
        ("SERVER: Received message larger than max (17 vs. 16)", InvalidRequest),
        ("CLIENT: Sent message larger than max (17 vs. 16)", InvalidRequest),
        ("received metadata size exceeds hard limit (20007 vs. 16384)", InvalidRequest),
        ("CLIENT: Received message larger than max (17 vs. 16)", ServerError),
        ("64 streams wait already; try again later", Overloaded),
        ("Bandwidth exhausted", Overloaded),
    ],
)
def test_a_status_of_the_transport_is_told_from_ours(details: str, kind: type) -> None:
    error = status_error("127.0.0.1:1", grpc.StatusCode.RESOURCE_EXHAUSTED, details)
    assert type(error) is kind
    assert error.retryable is (kind is Overloaded)
    sizes = re.search(r"vs. (\d+)", details)
    assert error.limit == (int(sizes[1]) if sizes and kind is InvalidRequest else None)


def test_a_size_limit_is_not_tried_again(fake: Fake) -> None:
    lost = Status(grpc.StatusCode.UNAVAILABLE, "the connection was lost")
    large = "CLIENT: Received message larger than max (17 vs. 16)"
    fake.script = [fake.accepted(keep=60), lost]
    fake.scripts = [[Status(grpc.StatusCode.RESOURCE_EXHAUSTED, large)]]
    with (
        Client(fake.address) as client,
        client.generate("x") as stream,
        pytest.raises(StreamCut, match="larger than max"),
    ):
        list(stream)
    assert len(fake.requests) == 2


def test_where_ray_answers_in_place_of_a_replica_a_new_try_may_help() -> None:
    details = "Application '' not found. Ping /ray.serve.RayServeAPIService/ListApplications"
    error = status_error("127.0.0.1:1", grpc.StatusCode.NOT_FOUND, details)
    assert (type(error).__name__, error.retryable) == ("ServerUnavailable", True)


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": [1] * 200_000 + [-1]},
        {"prompt": ["x" * 100_000]},
        {"stop": [1] * 200_000},
        {"allowed_token_ids": [1] * 200_000 + ["x" * 100_000]},
        {"logit_bias": {n: "x" for n in range(100_000)}},
        {"seed": "9" * 100_000},
        {"time_limit": "9" * 100_000},
        {"keep": "9" * 100_000},
        {"timeout": "9" * 100_000},
        {"model": 10**4000},
    ],
    ids=lambda given: next(iter(given)),
)
def test_a_message_is_short_whatever_was_given(using: Call, given: Any) -> None:
    with pytest.raises(InvalidRequest) as raised:
        using(lambda client: client.generate(**given))
    assert 20 < len(str(raised.value)) <= SHORT


def test_the_item_that_is_wrong_is_named(using: Call) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt\.tokens\.ids\[200000\] is -1; it must be "):
        using(lambda client: client.generate([1] * 200_000 + [-1]))
    with pytest.raises(InvalidRequest, match=r"^stopping\.stop\[1\] is not valid: 2 "):
        using(lambda client: client.generate("x", stop=["a", 2]))


@pytest.mark.parametrize(
    ("given", "field", "limit", "bounds"),
    [
        ({"seed": 2**64}, "sampling.seed", 2**64 - 1, f"between 0 and {2**64 - 1}"),
        ({"seed": -1}, "sampling.seed", 0, f"between 0 and {2**64 - 1}"),
        ({"max_tokens": 0x100000000}, "stopping.max_tokens", 2**32 - 1, "between 1 and 4294967295"),
        ({"n": -1}, "output.n", 1, "between 1 and 128"),
        ({"priority": 2**40}, "priority", 100, "between -100 and 100"),
        ({"logprobs": 2**32}, "output.logprobs", 20, "between 0 and 20"),
        ({"prompt": [1, 2**40]}, "prompt.tokens.ids[1]", 2**32 - 1, "between 0 and 4294967295"),
        ({"logit_bias": {1: 1.0, -1: 0.0}}, "sampling.logit_bias[-1]", None, "out of range"),
        ({"allowed_token_ids": []}, "sampling.allowed_token_ids", 1, "at least 1 id"),
        ({"keep": math.inf}, "keep", 86400, "at most 86400"),
        ({"time_limit": math.inf}, "stopping.time_limit", 315576000000, "at most 315576000000"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_a_message_cannot_hold_names_field_and_bounds_as_the_server_does(
    using: Call, given: Any, field: str, limit: float | None, bounds: str
) -> None:
    given = {"prompt": "x", **given}
    with pytest.raises(InvalidRequest, match=f"(?i){re.escape(bounds)}") as raised:
        using(lambda client: client.generate(**given))
    assert (raised.value.field, raised.value.limit) == (field, limit)


def test_one_bad_word_is_one_and_not_its_letters(using: Call, fake: Fake) -> None:
    fake.script = [fake.accepted(), fake.finished(2)]
    using(lambda client: client.complete("x", bad_words="import"))
    assert [*fake.requests[0].sampling.bad_words] == ["import"]


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"json_schema": {"type": "null"}}, pb.Grammar(json_schema='{"type": "null"}')),
        ({"json_schema": '{"type":"null"}'}, pb.Grammar(json_schema='{"type":"null"}')),
        ({"json_schema": {}}, pb.Grammar(json_schema="{}")),
        ({"json_object": True}, pb.Grammar(json_object=pb.JsonObject())),
        ({"regex": "a+"}, pb.Grammar(regex="a+")),
        ({"choice": ["yes", "no"]}, pb.Grammar(choice=pb.Choice(texts=["yes", "no"]))),
        ({"lark": 'start: "a"'}, pb.Grammar(lark='start: "a"')),
    ],
    ids=str,
)
def test_what_an_output_must_be(using: Call, fake: Fake, given: Any, sent: pb.Grammar) -> None:
    fake.script = [fake.accepted(), fake.finished(2)]
    using(lambda client: client.complete("x", **given))
    assert fake.requests[0].sampling.grammar == sent


@pytest.mark.parametrize("given", [{}, {"json_object": False}, {"regex": None, "choice": None}])
def test_an_output_may_be_anything(using: Call, fake: Fake, given: Any) -> None:
    fake.script = [fake.accepted(), fake.finished(2)]
    using(lambda client: client.complete("x", **given))
    assert not fake.requests[0].sampling.HasField("grammar")


@pytest.mark.parametrize(
    ("given", "field", "reason"),
    [
        ({"regex": "a", "choice": ["a"]}, "sampling.grammar", "regex and choice"),
        ({"json_schema": {"const": {1, 2}}}, "sampling.grammar.json_schema", "as JSON"),
        ({"json_schema": {"const": float("nan")}}, "sampling.grammar.json_schema", "as JSON"),
        ({"json_schema": 5}, "sampling.grammar.json_schema", "not valid"),
        ({"choice": "yes"}, "sampling.grammar.choice", "a list of strings"),
        ({"choice": ["a", 5]}, "sampling.grammar.choice.texts[1]", "not valid"),
        ({"choice": []}, "sampling.grammar.choice", "at least 1"),
        ({"regex": ""}, "sampling.grammar.regex", "empty"),
    ],
    ids=str,
)
def test_what_an_output_cannot_be(using: Call, given: Any, field: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as raised:
        using(lambda client: client.generate("x", **given))
    assert raised.value.field == field


@pytest.mark.parametrize("snapshot", ["text", 5, None])
def test_a_snapshot_that_is_no_bytes_is_refused(using: Call, snapshot: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"snapshot is of type .* give the bytes"):
        using(lambda client: client.sessions.import_(snapshot))


def test_a_message_of_the_server_is_short(fake: Fake) -> None:
    fake.refusal = Status(grpc.StatusCode.INVALID_ARGUMENT, "x" * 5_000)
    with Client(fake.address) as client, pytest.raises(InvalidRequest) as raised:
        client.models()
    assert len(str(raised.value)) <= SHORT


@pytest.mark.parametrize(
    "call", ["model", "resume", "pause", "continue_", "fork", "export", "delete"]
)
def test_a_name_that_is_no_text_is_named(using: Call, call: str) -> None:
    methods = {
        "model": lambda client, name: client.model(name),
        "resume": lambda client, name: client.resume(name),
        "pause": lambda client, name: client.sessions.pause(name),
        "continue_": lambda client, name: client.sessions.continue_(name),
        "fork": lambda client, name: client.sessions.fork(name),
        "export": lambda client, name: client.sessions.export(name),
        "delete": lambda client, name: client.sessions.delete(name),
    }
    for name in ("\udcff", 5):
        with pytest.raises(InvalidRequest, match=r"^(stream_id|model) is not valid"):
            using(lambda client, name=name: methods[call](client, name))


@pytest.mark.parametrize(
    "address",
    [
        "",
        "h\udcff:1",
        "a\n:1",
        "127.0.0.1",
        "host:",
        ":1",
        "host:0",
        "host:65536",
        "host:x",
        "::1:9",
    ],
)
async def test_an_address_that_is_none_is_named(address: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(InvalidRequest, match=r"^address is .*\[::1\]:9000"):
            kind(address)


@pytest.mark.parametrize("address", ["h:65535", "[::1]:1", "dns:///h", "ipv6:[::1]:1", "unix:/x"])
async def test_an_address_that_grpc_knows_is_taken(address: str) -> None:
    for kind in (Client, AsyncClient):
        kind(address)
