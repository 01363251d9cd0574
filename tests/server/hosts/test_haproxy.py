from __future__ import annotations

import asyncio
import http.server
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from concertina.addresses import host_of, join, reachable
from concertina.client.channel import Access, Tls
from concertina.client.statuses import status_error
from server.config import TlsConfig
from server.hosts import haproxy
from server.hosts.haproxy import (
    bind_address,
    haproxy_program,
    wait_for_replicas,
    write_script,
)
from server.ops.ports import free_ports
from tests.certificates import Certificates

SOON = 10.0
SERVED = "UNIMPLEMENTED"  # of a server without services
IDLE_S = 60
# The configuration that Ray writes begins with `global`, which must come first.
RAYS = "global\n    nbthread 1\ndefaults\n    mode http\n    timeout client 1s\n"

PROGRAM = haproxy_program()
needs_haproxy = pytest.mark.skipif(PROGRAM is None, reason="no HAProxy here")

HEADER = "# pxname,svname,qcur,status,weight,act,bck,chkfail"
REPLICA = "grpc-concertina,replica-{},0,{},1,1,0,0"
PYTHON_PROXY = "grpc-concertina,proxy,0,UP,1,0,1,0"
REST = "grpc-concertina,BACKEND,0,UP,1,1,0,0\nhttp-concertina,replica-1,0,UP,1,1,0,0"


@contextmanager
def stats(*pages: str) -> Iterator[int]:
    """The port of an HAProxy whose stats are these pages, one after the other."""
    left = list(pages)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/stats;csv"
            self.send_response(200)
            self.end_headers()
            self.wfile.write((left.pop(0) if len(left) > 1 else left[0]).encode())

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def page(*rows: str) -> str:
    return "\n".join((HEADER, *rows, REST))


def test_all_replicas_must_be_up() -> None:
    one, two = REPLICA.format(1, "UP"), REPLICA.format(2, "UP 1/2")
    with stats(page(PYTHON_PROXY), page(one, PYTHON_PROXY), page(one, two, PYTHON_PROXY)) as port:
        wait_for_replicas(port, "grpc-concertina", 2, 20.0)


@pytest.mark.parametrize("rows", [(), (PYTHON_PROXY,), (REPLICA.format(1, "DOWN"), PYTHON_PROXY)])
def test_the_python_proxy_is_not_a_replica(rows: tuple[str, ...]) -> None:
    with stats(page(*rows)) as port, pytest.raises(TimeoutError, match="reaches 0 of 1"):
        wait_for_replicas(port, "grpc-concertina", 1, 0.3)


def test_no_haproxy_runs() -> None:
    (port,) = free_ports(1)
    with pytest.raises(TimeoutError, match="reaches 0 of 1"):
        wait_for_replicas(port, "grpc-concertina", 1, 0.3)


@asynccontextmanager
async def tls_listener(tls: TlsConfig, folder: Path) -> AsyncIterator[str]:
    """Address of HAProxy with TLS, in front of a server that answers all calls with `SERVED`."""
    assert PROGRAM is not None
    folder.mkdir()
    server = grpc.aio.server()
    plaintext = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    address = f"127.0.0.1:{free_ports(1)[0]}"
    script = write_script(PROGRAM, folder, address, plaintext, tls, IDLE_S)
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
    port = int(address.rpartition(":")[2])
    try:
        _, writer = await asyncio.open_connection(host_of(address), port)
    except OSError:
        return False
    writer.close()
    return True


async def answer(address: str, tls: Tls | None) -> tuple[str, str]:
    """Status of a call over a new connection, and what the client reports to its user."""
    async with Access(tls=tls).async_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary("/some.Service/Method")(b"", timeout=SOON)
    error = raised.value
    return error.code().name, str(status_error(address, error.code(), str(error.details())))


@needs_haproxy
async def test_tls(certificates: Certificates, tmp_path: Path) -> None:
    tls = certificates.server()
    async with tls_listener(tls, tmp_path / "a folder") as address:
        assert (await answer(address, Tls(certificates.trusted.file)))[0] == SERVED
        for stranger in (None, Tls(), Tls(certificates.strange.file)):
            status, message = await answer(address, stranger)
            assert (status, "--tls" in message) == ("UNAVAILABLE", True), message


@needs_haproxy
async def test_mtls(certificates: Certificates, tmp_path: Path) -> None:
    trusted = certificates.trusted
    caller, stranger = trusted.issue("caller"), certificates.strange.issue("stranger")
    expired = trusted.issue("late", days=0)
    async with tls_listener(certificates.server(mutual=True), tmp_path / "folder") as address:
        assert (await answer(address, Tls(trusted.file, *caller)))[0] == SERVED
        others = [Tls(trusted.file), *(Tls(trusted.file, *pair) for pair in (stranger, expired))]
        for other in (None, *others):
            status, message = await answer(address, other)
            assert (status, "--cert" in message) == ("UNAVAILABLE", True), message


RAYS_PORTS = """\
global
    stats socket {folder}/admin.sock mode 666 level admin expose-fd listeners
defaults
    mode http
    timeout client 1s
    timeout connect 1s
    timeout server 1s
frontend prometheus
    bind :{metrics}
frontend grpc_frontend
    bind 127.0.0.1:{port} proto h2
listen stats
  bind *:{stats}
"""


def test_addresses_as_haproxy_takes_them() -> None:
    hosts = ("127.0.0.1", "0.0.0.0", "::", "::1")
    assert [bind_address(host, 9) for host in hosts] == [
        "127.0.0.1:9",
        "0.0.0.0:9",
        "[::]:9",
        "[::1]:9 v6only",
    ]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0"])
def test_what_ray_opens_to_everyone_is_on_loopback(host: str, tmp_path: Path) -> None:
    config = tmp_path / "rays.cfg"
    text = RAYS_PORTS.format(folder=tmp_path, port=9000, metrics=1, stats=2)
    bind = bind_address(host, 9000)
    script = write_script("/bin/echo", tmp_path, bind, "127.0.0.1:9000", None, IDLE_S)
    for _ in range(2):  # Ray writes it again whenever the replicas change
        config.write_text(text)
        ran = subprocess.run([script, "-db", "-f", str(config)], capture_output=True, text=True)
        assert (ran.stdout, ran.stderr) == (f"-db -f {config}\n", "")
        lines = [line.strip() for line in config.read_text().splitlines() if " bind " in line]
        assert lines == ["bind 127.0.0.1:1", f"bind {bind} proto h2", "bind 127.0.0.1:2"]


@needs_haproxy
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::"])
async def test_a_reload_keeps_every_listener(host: str, tmp_path: Path) -> None:
    assert PROGRAM is not None
    port, metrics, stats = free_ports(3)
    script = write_script(
        PROGRAM, tmp_path, bind_address(host, port), f"127.0.0.1:{port}", None, IDLE_S
    )
    (tmp_path / "rays.cfg").write_text(
        RAYS_PORTS.format(folder=tmp_path, port=port, metrics=metrics, stats=stats)
    )
    command = [str(script), "-db", "-f", str(tmp_path / "rays.cfg")]
    wanted = [(reachable(host), port), ("127.0.0.1", metrics), ("127.0.0.1", stats)]
    processes: list[subprocess.Popen[bytes]] = []
    reload: list[str] = []
    try:
        for turn in range(3):
            if turn:
                reload = ["-sf", str(processes[-1].pid), "-x", str(tmp_path / "admin.sock")]
            processes.append(subprocess.Popen([*command, *reload], stderr=subprocess.DEVNULL))
            async with asyncio.timeout(SOON):
                if turn:
                    await asyncio.to_thread(processes[-2].wait)
                while not all([await listens(join(*address)) for address in wanted]):
                    await asyncio.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait(SOON)


@needs_haproxy
def test_a_proxy_is_not_asked_for_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with stats(page(REPLICA.format(1, "UP"))) as port:
        wait_for_replicas(port, "grpc-concertina", 1, SOON)


async def closed_after(address: str) -> float:
    """Seconds until the other side closes a connection over which nothing is said."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    began = asyncio.get_running_loop().time()
    async with asyncio.timeout(SOON):
        with suppress(ConnectionResetError):
            await reader.read()
    writer.close()
    return asyncio.get_running_loop().time() - began


@needs_haproxy
async def test_a_handshake_has_an_end(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(haproxy, "handshake_seconds", 1)
    async with tls_listener(certificates.server(), tmp_path / "folder") as address:
        assert 0.5 < await closed_after(address) < 5
        tls = Tls(certificates.trusted.file)
        async with Access(tls=tls).async_channel(address) as channel:
            call = channel.unary_unary("/some.Service/Method")
            for pause in (2.5, 0):  # beyond the limit: a connection that is in use is not closed
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await call(b"", timeout=SOON)
                assert raised.value.code().name == SERVED
                assert channel.get_state().name == "READY"
                await asyncio.sleep(pause)
