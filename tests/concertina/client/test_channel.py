"""What goes with every call, and how connections are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer

from concertina.cli.options import access
from concertina.client import (
    AsyncClient,
    Client,
    ConcertinaError,
    InvalidRequest,
    ServerUnavailable,
)
from concertina.client.channel import Access, Tls

SOON = 10.0
METHODS = ["GenerationService/Generate", "GenerationService/Score"]
METHODS += ["ModelService/ListModels", "ModelService/GetModel"]


class Recorder(grpc.GenericRpcHandler):
    """Answers nothing, but notes what was called, and with which key."""

    def __init__(self) -> None:
        self.address = ""
        self.calls: list[tuple[str, str | None]] = []

    def service(self, details: Any) -> None:
        metadata = dict(details.invocation_metadata)
        method = details.method.removeprefix("/concertina.v1.")
        self.calls.append((method, metadata.get("authorization")))


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, handlers=[recorder])
        recorder.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield recorder
        server.stop(None).wait(SOON)


def call_all(address: str, **access: Any) -> None:
    with Client(address, **access) as client:
        for call in (
            lambda: list(client.generate(timeout=SOON)),
            lambda: client.score("x", timeout=SOON),
            lambda: client.models(timeout=SOON),
            lambda: client.model(timeout=SOON),
        ):
            with pytest.raises(ConcertinaError):
                call()


def call_all_async(address: str, **access: Any) -> None:
    async def calls() -> None:
        async with AsyncClient(address, **access) as client:
            with pytest.raises(ConcertinaError):
                await anext(aiter(client.generate(timeout=SOON)))
            for call in (client.score("x", timeout=SOON), client.models(), client.model()):
                with pytest.raises(ConcertinaError):
                    await call

    asyncio.run(calls())


@pytest.fixture(params=[call_all, call_all_async], ids=["blocking", "asyncio"])
def calls(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_the_key_goes_with_every_call(
    calls: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls(recorder.address, key="mine")
    assert recorder.calls == [(method, "Bearer mine") for method in METHODS]
    recorder.calls.clear()
    monkeypatch.setenv("CONCERTINA_KEY", " ours\n")
    calls(recorder.address)
    calls(recorder.address, key="mine")
    assert [key for _, key in recorder.calls] == ["Bearer ours"] * 4 + ["Bearer mine"] * 4


def test_without_a_key_none_is_sent(
    calls: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONCERTINA_KEY", "ours")
    calls(recorder.address, key="")
    monkeypatch.delenv("CONCERTINA_KEY")
    calls(recorder.address)
    assert recorder.calls == [(method, None) for method in METHODS * 2]


def test_a_key_that_no_header_carries_is_refused() -> None:
    for key in ("schlüssel", "two\nlines"):
        with pytest.raises(InvalidRequest, match="API key") as raised:
            Client(key=key)
        assert key not in str(raised.value)


def test_a_key_is_not_shown() -> None:
    assert "mine" not in repr(Access("mine"))


def test_the_options_say_how_to_get_in(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine\n")
    assert access(None, False, None, None, None) == Access()
    assert access(file, False, None, None, None) == Access("mine")
    assert access(None, True, None, None, None) == Access(tls=Tls())
    assert access(None, False, file, None, None) == Access(tls=Tls(file))
    assert access(None, False, None, file, file) == Access(tls=Tls(None, file, file))
    with pytest.raises(typer.BadParameter, match="--cert-key"):
        access(None, True, None, file, None)


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that nobody answers at, as the environment names it."""
    for name in ("grpc_proxy", "http_proxy", "https_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://user:secret@127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)


def test_what_is_on_this_machine_is_called_directly(
    calls: Any, recorder: Recorder, proxied: None
) -> None:
    calls(recorder.address)
    calls(recorder.address.replace("127.0.0.1", "localhost"))
    assert [method for method, _ in recorder.calls] == METHODS * 2


def test_an_error_behind_a_proxy_names_it(proxied: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with Client("models.test:9000") as client, pytest.raises(ServerUnavailable) as raised:
        client.models(timeout=SOON)
    message = str(raised.value)
    assert "models.test:9000, reached by the proxy 127.0.0.1:9 (grpc_proxy)" in message
    assert "no_proxy=models.test" in message
    assert "secret" not in message
