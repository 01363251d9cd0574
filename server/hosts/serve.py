"""The command `serve`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import psutil
import typer
from rich.console import Console

from concertina.cli.output import plain_console
from concertina.codecs.chat_template import ChatTemplateError, compiled
from concertina.machine import cores, cores_if_fewer, memory_bytes, share_of_memory
from server.auth.api_keys import read_keys
from server.auth.tls import require_usable, tls_config
from server.config import ConfigError, EngineConfig, Provider, ServeConfig
from server.hosts.greeting import greeting
from server.hosts.ray_environment import HAPROXY_PROGRAM, LOOPBACK, ray_environment
from server.hosts.scratch import scratch_folder
from server.hosts.sources import bundle_of, is_pretrained
from server.ops.options import Host, TlsCert, TlsClientCa, TlsKey, number
from server.ops.ports import PortTaken, require_free
from server.ops.process import interrupt_on_stop_signals
from server.snapshots.opening import open_store

BUNDLES: Final = Path("bundles")
HTTP_PORT: Final = 8000
_WATCHED_SHARES: Final = 4  # with --watch: number of bundles that memory is divided for


def serve(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[SOURCE]...",
            help="Bundle folders; or Hugging Face folders, GGUF files and hub ids, which are "
            "converted first. [dim]\\[default: every bundle in ./bundles][/]",
            show_default=False,
        ),
    ] = None,
    watch: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Serve the bundles in this directory and watch it: one that is added, changed "
            "or removed is served, replaced or drained without a restart.",
        ),
    ] = None,
    host: Host = ServeConfig.host,
    port: Annotated[int, number("port", "Port of the gRPC services.")] = ServeConfig.port,
    metrics_port: Annotated[
        int, number("metrics_port", "Port for Prometheus metrics and health; 0 turns it off.")
    ] = ServeConfig.metrics_port,
    http_port: Annotated[
        int | None,
        number(
            "http_port",
            "Port of OpenAI's HTTP API, on the same address; 0 turns it off. [dim]\\[default: "
            "8000, or none if that is taken][/]",
        ),
    ] = None,
    slots: Annotated[
        int, number("slots", "Streams of one bundle that decode at the same time.")
    ] = EngineConfig.slots,
    queue_limit: Annotated[
        int,
        number("queue_limit", "Streams of one bundle that may wait; further ones are refused."),
    ] = EngineConfig.queue_limit,
    queue_tokens: Annotated[
        int,
        number(
            "queue_tokens", "Prompt tokens of one bundle that may wait; further ones are refused."
        ),
    ] = EngineConfig.queue_tokens,
    state_limit_bytes: Annotated[
        int,
        number(
            "state_limit_bytes",
            "Largest state that the streams of one bundle may reach; 0 divides half of the memory "
            "(of the container, if it has less) among bundles and replicas (with --watch: as if "
            "for four bundles).",
        ),
    ] = EngineConfig.state_limit_bytes,
    prefix_cache_bytes: Annotated[
        int,
        number(
            "prefix_cache_bytes", "Memory for the folded blocks that prompts share; 0 keeps none."
        ),
    ] = EngineConfig.prefix_cache_bytes,
    prefill_chunk: Annotated[
        int,
        number(
            "prefill_chunk", "Most prompt tokens in one pass; running streams decode in between."
        ),
    ] = EngineConfig.prefill_chunk,
    prefill_share: Annotated[
        float,
        number("prefill_share", "Share of the time that prompts may take while streams decode."),
    ] = EngineConfig.prefill_share,
    replicas: Annotated[
        int, number("replicas", "Number of server processes; each serves every bundle.")
    ] = ServeConfig.replicas,
    threads: Annotated[
        int, number("threads", "Threads for each model; 0 uses all cores.")
    ] = EngineConfig.threads,
    provider: Annotated[
        Provider,
        typer.Option(help="Device to compute on; cuda needs the extra `gpu` and float16 caches."),
    ] = EngineConfig.provider,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            help="Jinja file that turns messages into text, in place of the bundles' own.",
        ),
    ] = None,
    drain_seconds: Annotated[
        int,
        number(
            "drain_seconds",
            "Time for streams to end after Ctrl-C, or after their bundle is removed.",
        ),
    ] = ServeConfig.drain_seconds,
    draft_tokens: Annotated[
        int,
        number(
            "draft_tokens",
            "Draft tokens to guess from repeated text while a single stream runs; "
            "they change only its speed. 0 turns it off; so do int8 and int4 weights.",
        ),
    ] = EngineConfig.draft_tokens,
    snapshots: Annotated[
        str,
        typer.Option(
            help="URI of a folder for snapshots, file:///var/lib/concertina or s3://bucket/folder: "
            "kept streams then survive the end of this server."
        ),
    ] = ServeConfig.snapshots,
    snapshots_optional: Annotated[
        bool,
        typer.Option(
            "--snapshots-optional",
            help="Start also while the store of --snapshots cannot be used; until it can, kept "
            "streams do not survive the end of this server.",
        ),
    ] = ServeConfig.snapshots_optional,
    snapshot_interval: Annotated[
        int, number("snapshot_interval", "Tokens between two snapshots of a stream.")
    ] = EngineConfig.snapshot_interval,
    snapshot_ttl: Annotated[
        int, number("snapshot_ttl", "Seconds after which a snapshot expires.")
    ] = ServeConfig.snapshot_ttl,
    session_bytes: Annotated[
        int | None,
        number(
            "session_bytes",
            "Memory for the state of kept streams that have ended. [dim]\\[default: 1 GiB, or an "
            "eighth of the memory (of the container, if it has less), divided among replicas][/]",
        ),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            envvar="CONCERTINA_KEYS",
            help="File of API keys, made by `concertina keys`; callers then need a key.",
        ),
    ] = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    plain_port: Annotated[
        int,
        number(
            "plain_port",
            "Port on 127.0.0.1 that accepts plaintext beside TLS, for a gateway of your own, and "
            "for whoever else is on this machine; 0 opens none.",
        ),
    ] = ServeConfig.plain_port,
    local: Annotated[
        bool, typer.Option("--local", help="Run in one process without Ray; starts in seconds.")
    ] = False,
) -> None:
    """Serve bundles over gRPC, and over OpenAI's HTTP API, until Ctrl-C.

    A pretrained model is converted once, which takes minutes and the extra `train`, and kept below
    ~/.cache/concertina or $CONCERTINA_CACHE; docs/bring-your-own.md says which models can be.

    Examples:
    concertina serve
    concertina serve bundles/python-4k --port 9001 --slots 64
    concertina serve --local
    concertina serve models/SmolLM2-135M-Instruct.Q4_1.gguf
    concertina serve --watch bundles
    concertina serve --replicas 2 --snapshots file:///var/lib/concertina
    """
    if watch is not None and not watch.is_dir():
        raise NotADirectoryError(f"watch is {watch}, which is not a directory: create it first")
    chosen = bundles or ([] if watch else find_bundles(BUNDLES))
    if any(is_pretrained(source) for source in chosen):
        _require_ports(host, port, metrics_port, http_port)  # before minutes of work
    console, template = plain_console(), _template(chat_template)
    # Check files and ports first, so that a mistake ends the start at once, with a clear message.
    opened = [bundle_of(source, console.print) for source in chosen]
    folders = tuple(bundle.folder for bundle in opened)
    if threads == 0:
        threads = max(1, cores() // replicas) if replicas > 1 else cores_if_fewer()
    tls = tls_config(tls_cert, tls_key, tls_client_ca)
    if state_limit_bytes == 0:
        shares = replicas * (len(folders) or _WATCHED_SHARES)
        state_limit_bytes = memory_bytes() // (2 * shares)
    if session_bytes is None:
        session_bytes = share_of_memory(EngineConfig.session_bytes, replicas)
    config = ServeConfig(
        bundles=folders,
        watch=watch and watch.resolve(),
        host=host,
        port=port,
        metrics_port=metrics_port,
        http_port=http_port or 0,
        plain_port=plain_port,
        replicas=replicas,
        drain_seconds=drain_seconds,
        keys=None if keys is None else keys.resolve(),
        tls=tls,
        snapshots=snapshots,
        snapshots_optional=snapshots_optional,
        snapshot_ttl=snapshot_ttl,
        engine=EngineConfig(
            chat_template=template,
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
    if config.keys is not None:
        read_keys(config.keys)
    open_store(config.snapshots, config.snapshots_optional)
    if tls is not None:
        require_usable(tls)
    _require_ports(host, port, metrics_port, http_port)
    if plain_port:
        require_free(LOOPBACK, plain_port, "choose another with --plain-port")
    if http_port is None:
        config = replace(config, http_port=_usual_http_port(config, console))

    names = ", ".join(bundle.name for bundle in opened)
    console.print(f"starting {names or f'the bundles in {watch}'}")

    def announce(data_path: str) -> None:
        ready_s = time.time() - psutil.Process().create_time()
        console.print(f"ready after {ready_s:.1f} s: {data_path}")
        for line in greeting(config, opened):
            console.print(line)

    interrupt_on_stop_signals()
    with suppress(KeyboardInterrupt):
        _serve(config, local, announce)
    console.print("stopped")


def _usual_http_port(config: ServeConfig, console: Console) -> int:
    """The port of the HTTP API that nobody has to ask for; 0, with a word, if it is taken."""
    if HTTP_PORT in (config.port, config.metrics_port, config.plain_port):
        return 0
    try:
        require_free(config.host, HTTP_PORT, "")
    except PortTaken:
        console.print(f"no HTTP API: port {HTTP_PORT} is taken; choose another with --http-port")
        return 0
    return HTTP_PORT


def _require_ports(host: str, port: int, metrics_port: int, http_port: int | None) -> None:
    """Raise PortTaken, with the option for another, if one is in use."""
    require_free(host, port, "choose another port with --port")
    if metrics_port:
        require_free(host, metrics_port, "choose another with --metrics-port, or 0 for none")
    if http_port:
        require_free(host, http_port, "choose another with --http-port, or 0 for none")


def _template(file: Path | None) -> str:
    """What the file of a chat template says. Raises ConfigError if it is none."""
    if file is None:
        return ""
    try:
        source = file.read_text(encoding="utf-8")
        compiled(source, {})
    except OSError as error:
        raise ConfigError(f"--chat-template: {file} cannot be read: {error.strerror}") from None
    except (ChatTemplateError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template: {file} {error}") from None
    return source


def _serve(config: ServeConfig, local: bool, announce: Callable[[str], None]) -> None:
    if local:
        from server.hosts.local import serve as serve_locally

        serve_locally(config, announce)
        return
    with scratch_folder() as directory:
        values = ray_environment(config, directory)
        if HAPROXY_PROGRAM in values:  # the script runs the program that the variable named before
            os.environ[HAPROXY_PROGRAM] = values[HAPROXY_PROGRAM]
        for name, value in values.items():
            os.environ.setdefault(name, value)
        from server.hosts.ray_app import serve as serve_on_ray

        serve_on_ray(config, directory, announce)


def find_bundles(folder: Path) -> list[Path]:
    """The folders in `folder` that have a manifest. Raises FileNotFoundError if there are none."""
    found = sorted(manifest.parent for manifest in folder.glob("*/manifest.json"))
    if not found:
        raise FileNotFoundError(f"{folder.resolve()} holds no bundle: name a bundle folder")
    return found
