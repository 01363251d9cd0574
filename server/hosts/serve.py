"""The commands `serve` and `demo`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Final

import psutil
import typer
from rich.console import Console

from concertina.cli.generate import generate
from concertina.cli.paint import paint
from concertina.client import Client
from server.auth.api_keys import read_keys
from server.auth.tls import require_usable
from server.bundles.bundle import load_bundle
from server.config import ConfigError, EngineConfig, Provider, ServeConfig, TlsConfig
from server.hosts.ray_environment import HAPROXY_PROGRAM, switches
from server.ops.ports import free_ports, require_free
from server.ops.signals import interrupt_on_stop_signals
from server.snapshots.snapshots import open_store

BUNDLES: Final = Path("bundles")
_PROMPT: Final = "def "
_TOKENS: Final = 400
_LABEL: Final = "Smileys & Emotion"
_SEED: Final = 6
_CALL_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.1
_WATCHED_SHARES: Final = 4  # that memory is divided into, where more bundles may come
_START_SECONDS: Final = 15
_START_LIMIT_SECONDS: Final = 120.0
_STOP_LIMIT_SECONDS: Final = 60.0


class DemoFailed(Exception):
    """Something that the demo shows did not work."""


def serve(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders of bundles. [dim]\\[default: every bundle in ./bundles][/]",
            show_default=False,
        ),
    ] = None,
    watch: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Serve the bundles in this directory, and follow it: one that comes, changes or "
            "goes is served, replaced or drained without a restart.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 opens the port to the network.")
    ] = ServeConfig.host,
    port: Annotated[int, typer.Option(help="Port of the gRPC services.")] = ServeConfig.port,
    metrics_port: Annotated[
        int, typer.Option(help="Port of the Prometheus page; 0 leaves it out.")
    ] = ServeConfig.metrics_port,
    slots: Annotated[
        int, typer.Option(help="Streams of one bundle that decode at once.")
    ] = EngineConfig.slots,
    queue_limit: Annotated[
        int, typer.Option(help="Streams of one bundle that may wait; more are refused.")
    ] = EngineConfig.queue_limit,
    queue_tokens: Annotated[
        int, typer.Option(help="Prompt tokens of one bundle that may wait; more are refused.")
    ] = EngineConfig.queue_tokens,
    state_limit_bytes: Annotated[
        int,
        typer.Option(
            help="State that the streams of one bundle may come to hold; 0 shares half of the "
            "machine's memory out among bundles and replicas, as if for four with --watch."
        ),
    ] = EngineConfig.state_limit_bytes,
    prefix_cache_bytes: Annotated[
        int, typer.Option(help="Memory for blocks that prompts begin with; 0 keeps none.")
    ] = EngineConfig.prefix_cache_bytes,
    prefill_chunk: Annotated[
        int, typer.Option(help="Prompt tokens of one pass at most; streams step in between.")
    ] = EngineConfig.prefill_chunk,
    prefill_share: Annotated[
        float,
        typer.Option(help="Share of the time that prompts may take from running streams."),
    ] = EngineConfig.prefill_share,
    replicas: Annotated[
        int, typer.Option(help="Processes that serve, each with every bundle.")
    ] = ServeConfig.replicas,
    threads: Annotated[
        int, typer.Option(help="Threads of a model; 0 takes the cores there are.")
    ] = EngineConfig.threads,
    provider: Annotated[
        Provider,
        typer.Option(help="What computes; cuda needs the extra `gpu`, and caches in float16."),
    ] = EngineConfig.provider,
    drain_seconds: Annotated[
        int,
        typer.Option(help="How long streams may go on after Ctrl-C, or when their bundle goes."),
    ] = ServeConfig.drain_seconds,
    draft_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens to guess ahead, from what the text repeats, while one stream runs alone; "
            "they change nothing but its speed. 0 guesses none."
        ),
    ] = EngineConfig.draft_tokens,
    snapshots: Annotated[
        str,
        typer.Option(
            help="URI of a folder for snapshots, file:///var/lib/concertina or s3://bucket/folder: "
            "streams that are kept then survive this server."
        ),
    ] = ServeConfig.snapshots,
    snapshot_interval: Annotated[
        int, typer.Option(help="Tokens between two snapshots of a stream.")
    ] = EngineConfig.snapshot_interval,
    snapshot_ttl: Annotated[
        int, typer.Option(help="Seconds for which a snapshot can be used.")
    ] = ServeConfig.snapshot_ttl,
    session_bytes: Annotated[
        int, typer.Option(help="Memory for the state of streams that ended and are kept.")
    ] = EngineConfig.session_bytes,
    keys: Annotated[
        Path | None,
        typer.Option(
            envvar="CONCERTINA_KEYS",
            help="File of the API keys that callers need; `concertina keys` makes it.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate chain (PEM): serve with TLS, and TLS only.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Authority (PEM) of the certificates that callers need.")
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="One process without Ray: up in a second or two.")
    ] = False,
) -> None:
    """Serve bundles over gRPC until Ctrl-C.

    Examples:
    concertina serve
    concertina serve bundles/python-4k --port 9001 --slots 64
    concertina serve --local
    concertina serve --watch bundles
    concertina serve --replicas 2 --snapshots file:///var/lib/concertina
    """
    if watch is not None and not watch.is_dir():
        raise NotADirectoryError(f"watch is {watch}, which is no directory: make it first")
    chosen = bundles or ([] if watch else _bundles_in(BUNDLES))
    folders = tuple(folder.resolve() for folder in chosen)
    if threads == 0 and replicas > 1:
        threads = max(1, (os.cpu_count() or 1) // replicas)
    tls = _tls(tls_cert, tls_key, tls_client_ca)
    if state_limit_bytes == 0:
        shares = replicas * (len(folders) or _WATCHED_SHARES)
        state_limit_bytes = psutil.virtual_memory().total // (2 * shares)
    config = ServeConfig(
        bundles=folders,
        watch=watch and watch.resolve(),
        host=host,
        port=port,
        metrics_port=metrics_port,
        replicas=replicas,
        drain_seconds=drain_seconds,
        keys=None if keys is None else keys.resolve(),
        tls=tls,
        snapshots=snapshots,
        snapshot_ttl=snapshot_ttl,
        engine=EngineConfig(
            draft_tokens=draft_tokens,
            snapshot_interval=snapshot_interval,
            session_bytes=session_bytes,
            slots=slots,
            queue_limit=queue_limit,
            queue_tokens=queue_tokens,
            state_limit_bytes=state_limit_bytes,
            prefix_cache_bytes=prefix_cache_bytes,
            prefill_chunk=prefill_chunk,
            prefill_share=prefill_share,
            threads=threads,
            provider=provider,
        ),
    )
    # Here a wrong file or a taken port ends the start in a moment, and with a plain word.
    opened = [load_bundle(folder) for folder in folders]
    if config.keys is not None:
        read_keys(config.keys)
    open_store(config.snapshots)
    if tls is not None:
        require_usable(tls)
    require_free(host, port, "choose another one with --port")
    if metrics_port:
        require_free(host, metrics_port, "choose another one with --metrics-port, or 0 for none")

    console = Console(highlight=False, soft_wrap=True)
    names = ", ".join(bundle.name for bundle in opened)
    console.print(f"starting {names or f'the bundles in {watch}, as they come and go'}")

    def announce(data_path: str) -> None:
        ready_s = time.time() - psutil.Process().create_time()
        console.print(f"ready after {ready_s:.1f} s: {data_path}")
        console.print(f"  gRPC     {config.address} {_openness(config)}")
        if metrics_port:
            console.print(f"  metrics  http://{host}:{metrics_port}/metrics")
        if opened:
            verb = "paint" if opened[0].is_image else 'generate "import "'
            console.print(f"try: concertina {verb} -m {opened[0].name} --address {config.address}")
        else:
            console.print(f"see: concertina models --address {config.address}")

    interrupt_on_stop_signals()
    with suppress(KeyboardInterrupt):
        _serve(config, local, announce)
    console.print("stopped")


def _tls(cert: Path | None, key: Path | None, client_ca: Path | None) -> TlsConfig | None:
    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        raise ConfigError("TLS needs both --tls-cert and --tls-key")
    return TlsConfig(cert.resolve(), key.resolve(), client_ca and client_ca.resolve())


def _openness(config: ServeConfig) -> str:
    """Who is let in, and who can listen."""
    callers = "whoever reaches it" if config.keys is None else "callers with a key"
    if config.tls is None:
        return f"(plaintext, for {callers})"
    return f"({'TLS' if config.tls.client_ca is None else 'mTLS'}, for {callers})"


def _serve(config: ServeConfig, local: bool, announce: Callable[[str], None]) -> None:
    if local:
        from server.hosts.local import serve as serve_locally

        serve_locally(config, announce)
        return
    with tempfile.TemporaryDirectory(prefix="concertina-") as directory:
        values = switches(config, Path(directory))
        if config.tls is not None:  # runs whatever program stood there before
            os.environ[HAPROXY_PROGRAM] = values[HAPROXY_PROGRAM]
        for name, value in values.items():
            os.environ.setdefault(name, value)
        from server.hosts.ray_app import serve as serve_on_ray

        serve_on_ray(config, Path(directory), announce)


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", dir_okay=False, help="Where the picture goes.")
    ] = Path("demo.png"),
) -> None:
    """Serve the bundles in ./bundles on Ray Serve, have one write and one paint, and stop again.

    Fails unless everything worked and no process is left.

    Examples:
    concertina demo --out picture.png
    """
    bundles = _bundles_in(BUNDLES)
    console = Console(highlight=False, soft_wrap=True)
    with _server(bundles, console) as address, Client(address) as client:
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
                    address=address,
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
                    address=address,
                )
                console.print(f"saved {out}")
    console.print("stopped; no process is left")


@contextmanager
def _server(bundles: list[Path], console: Console) -> Iterator[str]:
    """The address of a server in a process of its own. Raises `DemoFailed` if it does not start,
    or does not end cleanly.
    """
    port, metrics_port = free_ports(2)
    address = f"127.0.0.1:{port}"
    options = ["--port", str(port), "--metrics-port", str(metrics_port), "--drain-seconds", "5"]
    command = [sys.executable, "-m", "concertina.cli.main", "serve", *map(str, bundles), *options]
    with tempfile.NamedTemporaryFile() as log:
        server = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _wait_for(server, Path(log.name), console)
            yield address
        finally:
            left = _end(server)
        if left or server.returncode:
            raise DemoFailed(f"the server ended with {server.returncode}; processes left: {left}")


def _wait_for(server: psutil.Popen, log: Path, console: Console) -> None:
    """Return when the server says that it is ready."""
    began = time.monotonic()
    waited_s = 0.0
    console.print("starting Ray Serve")
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
    """Stop the server as Ctrl-C would; the processes that this left behind, and that are killed."""
    if server.poll() is not None:
        return []
    processes = [server, *server.children(recursive=True)]
    server.terminate()
    _, alive = psutil.wait_procs(processes, timeout=_STOP_LIMIT_SECONDS)
    for process in alive:
        process.kill()
    return [process.pid for process in alive]


def _bundles_in(folder: Path) -> list[Path]:
    """The folders with a manifest; none is an error that says what to do."""
    found = sorted(manifest.parent for manifest in folder.glob("*/manifest.json"))
    if not found:
        raise FileNotFoundError(f"{folder.resolve()} holds no bundle: name the folder of one")
    return found
