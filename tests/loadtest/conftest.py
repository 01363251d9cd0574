from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from tests.loadtest import scripted


@pytest.fixture
async def serve() -> AsyncIterator[scripted.Serve]:
    """Starts a server with a script and returns its address."""
    servers: list[grpc.aio.Server] = []

    async def serve(script: scripted.Script) -> str:
        server, address = await scripted.serve(script)
        servers.append(server)
        return address

    yield serve
    for server in servers:
        await server.stop(None)
