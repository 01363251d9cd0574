"""TLS at the port of a gateway, also after its certificates were renewed."""

from __future__ import annotations

import asyncio
import http.client
import logging
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from server.config import TlsConfig
from server.http import process
from server.http.settings import GatewaySettings
from server.ops.ports import free_ports
from tests.certificates import Authority, Certificates

WAIT = 60.0
OTHER = "refused"


@contextmanager
def listening(tls: TlsConfig) -> Iterator[int]:
    """A gateway with these files, and the port of it."""
    (port,) = free_ports(1)
    settings = GatewaySettings("127.0.0.1:1", port=port, tls=tls, drain_seconds=1)
    server = uvicorn.Server(config := process.configuration(settings))

    async def run() -> None:
        renewing = asyncio.create_task(process.renew(config, tls))
        await server.serve(sockets=[process.listening(settings)])
        renewing.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(WAIT)


def answer(port: int, trusted: Authority, *own: Path) -> str:
    """The status of the gateway, or that one of us does not trust the other."""
    context = ssl.create_default_context(cafile=trusted.file)
    if own:
        context.load_cert_chain(*own)
    calling = http.client.HTTPSConnection("127.0.0.1", port, timeout=WAIT, context=context)
    try:
        calling.request("GET", "/version")
        return str(calling.getresponse().status)
    except (ssl.SSLError, ConnectionError, http.client.RemoteDisconnected):
        return OTHER
    finally:
        calling.close()


def _until(said: str, *call: Any) -> None:
    for _ in range(round(WAIT / 0.1)):
        with suppress(OSError):
            if answer(*call) == said:
                return
        threading.Event().wait(0.1)
    raise AssertionError(f"it never was {said}")


def test_renewed_certificates_are_used_without_a_restart(
    certificates: Certificates,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its own, and that of the authority which callers need, as at the gRPC port."""
    monkeypatch.setattr(process, "renewal_seconds", 0.1)
    monkeypatch.setattr(logging.getLogger("server"), "propagate", True)
    old, new = certificates.trusted, certificates.strange
    names = ("cert.pem", "key.pem", "ca.pem")
    tls = TlsConfig(*(tmp_path / name for name in names))
    of_old, of_new = ((*each.issue("gateway"), each.file) for each in (old, new))
    for file, content in zip(tls.files, of_old, strict=True):
        file.write_bytes(content.read_bytes())
    old_caller, new_caller = old.issue("caller"), new.issue("caller")
    with listening(tls) as port:
        _until("200", port, old, *old_caller)
        assert answer(port, old) == OTHER
        assert answer(port, old, *new_caller) == OTHER
        with caplog.at_level(logging.ERROR):
            tls.key.write_bytes(b"not a key")
            for _ in range(round(WAIT / 0.1)):
                if "keeping the old certificates" in caplog.text:
                    break
                threading.Event().wait(0.1)
        assert "keeping the old certificates" in caplog.text
        assert answer(port, old, *old_caller) == "200"
        for file, content in zip(tls.files, of_new, strict=True):
            file.write_bytes(content.read_bytes())
        _until("200", port, new, *new_caller)
        assert answer(port, old, *old_caller) == OTHER
        assert answer(port, new, *old_caller) == OTHER
        assert answer(port, new) == OTHER
