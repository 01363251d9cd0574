"""Sessions through both clients and the command line, over a real server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from concertina.cli.main import main
from concertina.client import (
    Accepted,
    AsyncClient,
    Client,
    ContractViolation,
    Event,
    Finished,
    InvalidRequest,
    Session,
    SessionNotFound,
    SessionUnsuitable,
    SnapshotRefused,
    Tokens,
)
from server.config import EngineConfig
from server.sessions.served_model import ServedModel, serve_bundles
from server.snapshots.sealer import Sealer
from server.snapshots.store import Store
from server.snapshots.writer import SnapshotWriter
from tests.concertina.faults import LIMIT_S, serving, slow_down
from tests.server.engines import is_empty, until

SEALER = Sealer([bytes(range(32))])
TEXT: dict[str, Any] = {"prompt": "An abacus", "seed": 3, "max_tokens": 20}


@pytest.fixture(scope="module")
def engines(text_bundle: Path) -> Iterator[dict[str, ServedModel]]:
    """One engine of a text model, slow enough to be paused before it ends."""
    opened = serve_bundles([text_bundle], EngineConfig(threads=1))
    for engine in opened.values():
        slow_down(engine)
    yield opened
    for engine in opened.values():
        engine.close()


@pytest.fixture
async def address(engines: dict[str, ServedModel], tmp_path: Path) -> AsyncIterator[str]:
    """A server that holds nothing in the end."""
    keeper = SnapshotWriter(Store(f"memory:/{tmp_path}"), SEALER, 60.0)
    async with serving(engines, keeper) as server:
        yield server.address
        await until(lambda: all(is_empty(engine) for engine in engines.values()), 10)
    keeper.close(10)


class Blocking:
    """A Client whose calls are made in a thread, in the words of AsyncClient."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def generate(self, **asked: Any) -> list[Event]:
        return await asyncio.to_thread(lambda: list(self._client.generate(**asked)))

    async def continue_(self, *said: Any, **asked: Any) -> list[Event]:
        return await asyncio.to_thread(
            lambda: list(self._client.sessions.continue_(*said, **asked))
        )

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client.sessions, name)
        return lambda *said, **asked: asyncio.to_thread(method, *said, **asked)


class Asyncio:
    """The same of an AsyncClient."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def generate(self, **asked: Any) -> list[Event]:
        return [event async for event in self._client.generate(**asked)]

    async def continue_(self, *said: Any, **asked: Any) -> list[Event]:
        return [event async for event in self._client.sessions.continue_(*said, **asked)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client.sessions, name)


@pytest.fixture(params=["blocking", "asyncio"])
async def client(request: pytest.FixtureRequest, address: str) -> AsyncIterator[Any]:
    """One of the two clients, in the same words."""
    async with asyncio.timeout(LIMIT_S):
        if request.param == "blocking":
            with Client(address) as blocking:
                yield Blocking(blocking)
        else:
            async with AsyncClient(address) as nonblocking:
                yield Asyncio(nonblocking)


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Tokens))


def name_of(events: list[Event]) -> str:
    assert isinstance(events[0], Accepted)
    return events[0].stream_id


async def left(client: Any) -> Session:
    """The only session, once the server knows that its reader has gone."""
    while True:
        (session,) = await client.list()
        if session.expires is not None:
            return cast(Session, session)
        await asyncio.sleep(0.01)


async def test_what_is_kept_goes_on(client: Any) -> None:
    whole = text_of(await client.generate(**TEXT | {"max_tokens": 40}))
    first = await client.generate(**TEXT, keep=60)
    name = name_of(first)
    session = await left(client)
    assert (session.stream_id, session.phase, session.model) == (name, "finished", "tiny-text")
    assert (session.prompt_tokens, session.generated_tokens, session.outputs) == (9, 20, 1)
    assert session.state_bytes > 0
    second = await client.continue_(name, max_tokens=20)
    assert name_of(second) == name
    assert text_of(first) + text_of(second) == whole
    third = await client.continue_(name, " and", max_tokens=3, temperature=0)
    assert isinstance(third[0], Accepted)
    assert third[0].prompt_tokens == 9 + 40 + 4
    assert third[0].sampling.temperature == 0
    await client.delete(name)
    await client.delete(name)
    assert await client.list() == ()


async def test_by_default_nothing_is_kept(client: Any) -> None:
    name = name_of(await client.generate(**TEXT))
    for call in (client.pause, client.fork, client.export, client.continue_):
        with pytest.raises(SessionNotFound, match=name) as missing:
            for _ in range(100):  # it is forgotten in the background
                await call(name)
                await asyncio.sleep(0.01)
        assert missing.value.code == "NOT_FOUND"


async def test_a_stream_is_paused_under_its_reader(client: Any, address: str) -> None:
    whole = text_of(await client.generate(**TEXT | {"max_tokens": 80}))
    async with AsyncClient(address) as other, other.generate(**TEXT | {"max_tokens": 80}) as stream:
        events = [await anext(stream), await anext(stream)]
        with pytest.raises(SessionUnsuitable, match="running"):
            await client.export(name_of(events))
        paused = await client.pause(name_of(events))
        events += [event async for event in stream]
    assert isinstance(events[-1], Finished) and events[-1].reason == "paused"
    assert paused.phase == "paused"
    rest = await client.continue_(name_of(events))
    assert text_of(events) + text_of(rest) == whole
    await client.delete(name_of(events))


async def test_copies_and_exports_go_on_alike(client: Any) -> None:
    events = await client.generate(**TEXT | {"temperature": 0}, keep=60)
    name = name_of(events)
    copies = await client.fork(name, 3)
    assert len({name, *copies}) == 4
    snapshot = await client.export(name)
    brought = await client.import_(snapshot)
    assert isinstance(brought, Session) and brought.generated_tokens == 20
    assert {session.stream_id for session in await client.list()} == {
        name,
        *copies,
        brought.stream_id,
    }
    going_on = [name, *copies, brought.stream_id]
    texts = {text_of(await client.continue_(one, max_tokens=10)) for one in going_on}
    assert len(texts) == 1 and len(texts.pop()) == 10
    with pytest.raises(SnapshotRefused):
        await client.import_(snapshot[:100] + b"?" + snapshot[101:])
    with pytest.raises(InvalidRequest, match="n is -1; it must be between 1 and 128"):
        await client.fork(name, -1)
    for one in going_on:
        await client.delete(one)


async def test_long_lists_and_long_snapshots_come_in_parts(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("concertina.client.sessions.PAGE_SIZE", 2)
    monkeypatch.setattr("concertina.client.sessions.PART_BYTES", 1000)
    monkeypatch.setattr("server.api.sessions.SessionServicer.part_bytes", 1000)
    name = name_of(await client.generate(**TEXT, keep=60))
    copies = await client.fork(name, 4)
    names = [session.stream_id for session in await client.list()]
    assert names == sorted([name, *copies])
    snapshot = await client.export(name)
    assert len(snapshot) > 3000
    names.append((await client.import_(snapshot)).stream_id)
    for one in names:
        await client.delete(one)


async def test_a_damaged_export_is_noticed(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = name_of(await client.generate(**TEXT, keep=60))

    class Damaged:
        @staticmethod
        def sha256(_: bytes) -> Any:
            return hashlib.sha256(b"of something else")

    monkeypatch.setattr("server.api.sessions.hashlib", Damaged)
    with pytest.raises(ContractViolation, match="cut or damaged"):
        await client.export(name)
    await client.delete(name)


Run = Callable[..., Any]


@pytest.fixture
def run(address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `concertina` with arguments, in a thread; its output. It must succeed."""
    monkeypatch.setenv("CONCERTINA_ADDRESS", address)

    def call(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["concertina", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capsys.readouterr()
        assert exit.value.code == code, err
        return str(out if code == 0 else err)

    async def run(*arguments: str, code: int = 0) -> str:
        return await asyncio.to_thread(call, *arguments, code=code)

    return run


async def test_the_command_line(run: Run, tmp_path: Path) -> None:
    asked = ("An abacus", "--seed", "3", "--temperature", "0")
    whole = await run("generate", *asked, "-n", "30")
    events = (await run("generate", *asked, "-n", "20", "--keep", "60", "--json")).splitlines()
    name = json.loads(events[0])["stream_id"]
    assert json.loads(events[0])["keep"] == 60
    first = "".join(json.loads(event).get("text", "") for event in events)

    (listed,) = [
        json.loads(line) for line in (await run("sessions", "list", "--json")).splitlines()
    ]
    assert (listed["stream_id"], listed["phase"]) == (name, "finished")
    table = await run("sessions", "list")
    assert name in table and "finished" in table and "29" in table

    (copy,) = (await run("sessions", "fork", "--", name)).split()
    assert len((await run("sessions", "fork", "--n", "2", "--json", "--", name)).splitlines()) == 2
    file = tmp_path / "story.snapshot"
    said = await run("sessions", "export", "-o", str(file), "--json", "--", name)
    assert json.loads(said)["bytes"] == file.stat().st_size > 0
    (brought,) = (await run("sessions", "import", str(file))).split()
    again = json.loads(await run("sessions", "import", "--json", str(file)))
    assert again["phase"] == "finished"
    for one in (name, copy, brought):
        assert first + await run("sessions", "continue", "-n", "10", "--", one) == whole
    events = (
        await run("sessions", "continue", "-n", "2", "--json", "--", name, " and")
    ).splitlines()
    assert json.loads(events[0])["prompt_tokens"] == 9 + 30 + 4
    assert "finished" in await run("sessions", "pause", "--", name)

    assert "is not known" in await run("sessions", "pause", "nothing", code=1)
    held = (await run("sessions", "list", "--json")).splitlines()
    assert all("T" in json.loads(line)["expires"] for line in held)
    told = json.loads(await run("sessions", "fork", "nothing", "--json", code=1))
    assert told["error"]["type"] == "SessionNotFound"
    left = [json.loads(line) for line in (await run("sessions", "list", "--json")).splitlines()]
    names = [session["stream_id"] for session in left]
    assert len(names) == 6
    deleted = (await run("sessions", "delete", "--json", "--", *names)).splitlines()
    assert [json.loads(line)["deleted"] for line in deleted] == names
    assert await run("sessions", "list", "--json") == ""


@pytest.mark.parametrize(
    "command", ["list", "pause", "continue", "fork", "export", "import", "delete"]
)
async def test_every_command_shows_examples(run: Run, command: str) -> None:
    page = await run("sessions", command, "--help")
    assert f"concertina sessions {command}" in page.split("Examples")[1]
