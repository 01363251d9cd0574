"""A port with TLS: whom it serves, whom it refuses, and what it makes of new certificates."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from concertina.client.channel import Access, Tls
from server.auth.tls import require_usable, server_credentials
from server.config import ConfigError, TlsConfig
from tests.certificates import Certificates

SOON = 10.0
SERVED = "UNIMPLEMENTED"  # by a server that has no services

Connect = Callable[[TlsConfig], Awaitable[str]]


@pytest.fixture
async def start() -> AsyncIterator[Connect]:
    servers: list[grpc.aio.Server] = []

    async def start(tls: TlsConfig) -> str:
        servers.append(grpc.aio.server())
        port = servers[-1].add_secure_port("127.0.0.1:0", server_credentials(tls))
        await servers[-1].start()
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        await server.stop(None)


async def answer(address: str, tls: Tls | None) -> tuple[str, str]:
    """Status and message of a call over a new connection."""
    async with Access(tls=tls).async_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary("/some.Service/Method")(b"", timeout=SOON)
    return raised.value.code().name, str(raised.value.details())


async def test_tls_serves_only_clients_that_trust_it(
    start: Connect, certificates: Certificates
) -> None:
    address = await start(certificates.server())
    assert (await answer(address, Tls(certificates.trusted.file)))[0] == SERVED
    for stranger in (None, Tls(), Tls(certificates.strange.file)):
        assert (await answer(address, stranger))[0] == "UNAVAILABLE"
    expired = Tls(certificates.trusted.file)
    out_of_date = TlsConfig(*certificates.trusted.issue("expired", days=0))
    status, details = await answer(await start(out_of_date), expired)
    assert (status, "expired" in details) == ("UNAVAILABLE", True)


async def test_mtls_serves_clients_with_a_certificate_of_its_authority(
    start: Connect, certificates: Certificates
) -> None:
    address = await start(certificates.server(mutual=True))
    trusted = certificates.trusted
    caller, stranger = trusted.issue("caller"), certificates.strange.issue("stranger")
    expired = trusted.issue("late", days=0)
    assert (await answer(address, Tls(trusted.file, *caller)))[0] == SERVED
    refused = (None, Tls(trusted.file), Tls(trusted.file, *stranger), Tls(trusted.file, *expired))
    for other in refused:
        assert (await answer(address, other))[0] == "UNAVAILABLE"


async def test_a_renewed_certificate_is_served_without_a_restart(
    start: Connect, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    tls = TlsConfig(*certificates.trusted.issue("renewed"))
    trusted, strange = Tls(certificates.trusted.file), Tls(certificates.strange.file)
    address = await start(tls)
    key = tls.key.read_bytes()
    for content in (b"not a key", b""):
        tls.key.write_bytes(content)
        with caplog.at_level(logging.ERROR):
            assert (await answer(address, trusted))[0] == SERVED
        assert str(tls.key) in caplog.text
        caplog.clear()
    assert key.decode() not in caplog.text
    for new, old in zip(certificates.strange.issue("renewed"), (tls.cert, tls.key), strict=True):
        old.write_bytes(new.read_bytes())
    assert (await answer(address, strange))[0] == SERVED
    assert (await answer(address, trusted))[0] == "UNAVAILABLE"


def test_files_that_do_not_make_a_server_are_named(
    certificates: Certificates, tmp_path: Path
) -> None:
    cert, key = certificates.trusted.issue("one")
    _, other = certificates.trusted.issue("other")
    junk, gone = tmp_path / "junk.pem", tmp_path / "gone.pem"
    junk.write_text("junk")
    require_usable(TlsConfig(cert, key, certificates.trusted.file))
    for tls, name in (
        (TlsConfig(cert, other), "other-key.pem"),
        (TlsConfig(gone, key), "gone.pem"),
        (TlsConfig(junk, key), "junk.pem"),
        (TlsConfig(cert, key, junk), "junk.pem"),
        (TlsConfig(cert, key, gone), "gone.pem"),
    ):
        with pytest.raises(ConfigError, match=name):
            server_credentials(tls)
