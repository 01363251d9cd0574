"""TLS by HAProxy, as Ray would start it, before a server that speaks plaintext."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from concertina.client.channel import Access, Tls
from concertina.client.errors import status_error
from server.config import TlsConfig
from server.hosts.edge import haproxy_program, write_edge
from server.ops.ports import free_ports
from tests.certificates import Certificates

SOON = 10.0
SERVED = "UNIMPLEMENTED"  # by a server that has no services
IDLE_S = 60
# What Ray writes begins with what may stand in front of everything else only.
RAYS = "global\n    nbthread 1\ndefaults\n    mode http\n    timeout client 1s\n"

PROGRAM = haproxy_program()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no HAProxy here")


@asynccontextmanager
async def edge(tls: TlsConfig, folder: Path) -> AsyncIterator[str]:
    """The address of an edge before a server that answers every call with `SERVED`."""
    assert PROGRAM is not None
    folder.mkdir()
    server = grpc.aio.server()
    plaintext = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    address = f"127.0.0.1:{free_ports(1)[0]}"
    script = write_edge(tls, address, plaintext, IDLE_S, PROGRAM, folder)
    (folder / "rays.cfg").write_text(RAYS)
    rays = ["-db", "-f", str(folder / "rays.cfg"), "-dR"]
    with subprocess.Popen([script, *rays], stderr=subprocess.PIPE) as haproxy:
        try:
            async with asyncio.timeout(SOON):
                while not await listens(address):
                    assert haproxy.poll() is None, haproxy.communicate()
                    await asyncio.sleep(0.05)
            yield address
        finally:
            haproxy.kill()
            haproxy.communicate(timeout=SOON)
            await server.stop(None)


async def listens(address: str) -> bool:
    host, port = address.split(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    return True


async def answer(address: str, tls: Tls | None) -> tuple[str, str]:
    """Status of a call over a new connection, and what a user is told."""
    async with Access(tls=tls).async_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary("/some.Service/Method")(b"", timeout=SOON)
    error = raised.value
    return error.code().name, str(status_error(address, error.code(), str(error.details())))


async def test_tls(certificates: Certificates, tmp_path: Path) -> None:
    tls = certificates.server()
    async with edge(tls, tmp_path / "an edge") as address:
        assert (await answer(address, Tls(certificates.trusted.file)))[0] == SERVED
        for stranger in (None, Tls(), Tls(certificates.strange.file)):
            status, told = await answer(address, stranger)
            assert (status, "--tls" in told) == ("UNAVAILABLE", True), told


async def test_mtls(certificates: Certificates, tmp_path: Path) -> None:
    trusted = certificates.trusted
    caller, stranger = trusted.issue("caller"), certificates.strange.issue("stranger")
    expired = trusted.issue("late", days=0)
    async with edge(certificates.server(mutual=True), tmp_path / "edge") as address:
        assert (await answer(address, Tls(trusted.file, *caller)))[0] == SERVED
        others = [Tls(trusted.file), *(Tls(trusted.file, *pair) for pair in (stranger, expired))]
        for other in (None, *others):
            status, told = await answer(address, other)
            assert (status, "--cert" in told) == ("UNAVAILABLE", True), told
