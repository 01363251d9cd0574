"""The command `demo`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Final

import psutil
import typer
from rich.console import Console

from concertina.cli.connection import Server
from concertina.cli.generate import generate
from concertina.cli.output import plain_console
from concertina.cli.paint import paint
from concertina.client import Client
from server.hosts.serve import BUNDLES, HTTP_PORT, find_bundles
from server.ops.ports import PortTaken, free_ports, require_free

_PROMPT: Final = "def "
_TOKENS: Final = 400
_LABEL: Final = "Smileys & Emotion"
_SEED: Final = 6
_CALL_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.1
_HOLD_SECONDS: Final = 3600.0
_START_SECONDS: Final = 15
_START_LIMIT_SECONDS: Final = 120.0
_STOP_LIMIT_SECONDS: Final = 60.0


class DemoFailed(Exception):
    """A step of the demo failed."""


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", dir_okay=False, help="File for the image.")
    ] = Path("demo.png"),
    chaos: Annotated[
        bool,
        typer.Option(
            "--chaos", help="Instead, serve a page with a button that kills the server behind it."
        ),
    ] = False,
) -> None:
    """Serve the bundles in ./bundles on Ray Serve, generate text and an image, and stop.

    On a terminal, the page that shows all this stays open until Ctrl-C. Fails if anything does not
    work or a process is left over.

    Examples:
    concertina demo --out picture.png
    concertina demo --chaos
    """
    bundles = find_bundles(BUNDLES)
    console = plain_console()
    if chaos:
        from server.hosts.demo_chaos import serve_chaos

        serve_chaos(bundles, console, usual_http_port())
        console.print("stopped; no process is left")
        return
    stays = sys.stdin.isatty() and sys.stdout.isatty()
    page_port = usual_http_port() if stays else 0
    options = ["--http-port", str(page_port), "--snapshots", "memory://demo"] if stays else []
    with running_server(bundles, console, *options) as address, Client(address) as client:
        models = client.models(timeout=_CALL_SECONDS)
        for model in sorted(models, key=lambda model: model.modality != "text"):
            console.rule(
                f"{model.name} ({model.attention} attention, {model.parameters:,} weights)"
            )
            if model.modality == "text":
                console.print(_PROMPT, end="")
                generate(
                    _PROMPT,
                    model=model.name,
                    max_tokens=min(_TOKENS, model.context - len(_PROMPT)),
                    temperature=0.9,
                    top_p=0.98,
                    seed=_SEED,
                    timeout=_CALL_SECONDS,
                    server=Server(address),
                )
                console.print()
            else:
                paint(
                    label=_LABEL if _LABEL in model.labels else None,
                    model=model.name,
                    out=out,
                    temperature=0.9,
                    seed=_SEED,
                    timeout=_CALL_SECONDS,
                    server=Server(address),
                )
                console.print(f"saved {out}")
        if stays:
            _hold(console, page_port)
        else:
            console.print(
                f"to see it in a browser: concertina serve, then http://127.0.0.1:{HTTP_PORT}/"
            )
    console.print("stopped; no process is left")


def usual_http_port() -> int:
    """The port of the HTTP API, or another one if that is taken."""
    try:
        require_free("127.0.0.1", HTTP_PORT, "")
    except PortTaken:
        return free_ports(1)[0]
    return HTTP_PORT


def _hold(console: Console, port: int) -> None:
    """Keep the page open until Ctrl-C."""
    console.print(f"page: http://127.0.0.1:{port}/ (until Ctrl-C)", soft_wrap=True)
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(_HOLD_SECONDS)


@contextmanager
def running_server(bundles: list[Path], console: Console, *more: str) -> Iterator[str]:
    """Start a server in its own process and yield its address; stop it at the end.

    more: options of `serve`.
    Raises `DemoFailed` if it does not start, or does not stop cleanly.
    """
    port, metrics_port = free_ports(2)
    address = f"127.0.0.1:{port}"
    options = ["--port", str(port), "--metrics-port", str(metrics_port)]
    options += ["--http-port", "0", "--drain-seconds", "5", *more]
    command = [sys.executable, "-m", "concertina.cli.main", "serve", *map(str, bundles), *options]
    with tempfile.NamedTemporaryFile() as log:
        server = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _wait_for(server, Path(log.name), console)
            yield address
        finally:
            left = _end(server)
        if left or server.returncode:
            raise DemoFailed(
                f"the server exited with code {server.returncode}; processes left over: {left}"
            )


def _wait_for(server: psutil.Popen, log: Path, console: Console) -> None:
    """Return when the server reports that it is ready. Raises DemoFailed."""
    began = time.monotonic()
    waited_s = 0.0
    console.print("starting the server")
    with console.status("") as status:
        while "\nready" not in log.read_text():
            waited_s = time.monotonic() - began
            if server.poll() is not None or waited_s > _START_LIMIT_SECONDS:
                sys.stderr.write(log.read_text())
                raise DemoFailed(f"the server did not start in {waited_s:.0f} s; its log is above")
            status.update(f"{waited_s:.0f} s of about {_START_SECONDS}")
            time.sleep(_POLL_SECONDS)
    console.print(f"ready after {waited_s:.1f} s")


def _end(server: psutil.Popen) -> list[int]:
    """Stop the server with SIGTERM, kill what is left, and return the pids of what was killed."""
    if server.poll() is not None:
        return []
    processes = [server, *server.children(recursive=True)]
    server.terminate()
    _, alive = psutil.wait_procs(processes, timeout=_STOP_LIMIT_SECONDS)
    for process in alive:
        process.kill()
    return [process.pid for process in alive]
