"""The command `gateway`."""

from __future__ import annotations

from typing import Annotated

import typer

from concertina.cli.options import Ca, Cert, CertKey, UseTls, access
from concertina.cli.output import plain_console
from server.auth.tls import require_usable, tls_config
from server.config import ServeConfig
from server.http.settings import GatewaySettings
from server.ops.logs import log_to_stderr
from server.ops.options import Host, TlsCert, TlsClientCa, TlsKey, number


def gateway(
    upstream: Annotated[
        str, typer.Option(help="Address of the gRPC server, HOST:PORT.")
    ] = f"127.0.0.1:{ServeConfig.port}",
    host: Host = GatewaySettings.host,
    port: Annotated[int, number("port", "Port to listen on.")] = GatewaySettings.port,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name in `Host` to answer to, while --host is loopback, besides localhost and its "
            "like. Repeatable."
        ),
    ] = None,
    drain_seconds: Annotated[
        int, number("drain_seconds", "Time for streams to end after Ctrl-C.")
    ] = GatewaySettings.drain_seconds,
    max_body_bytes: Annotated[
        int, number("max_body_bytes", "Largest body of a request.")
    ] = GatewaySettings.max_body_bytes,
    streams_per_key: Annotated[
        int, number("streams_per_key", "Calls that one key may have open; further are refused.")
    ] = GatewaySettings.streams_per_key,
    slow_reader_seconds: Annotated[
        float,
        number(
            "slow_reader_seconds", "Time after which a reader that takes nothing loses its stream."
        ),
    ] = GatewaySettings.slow_reader_seconds,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    tls: UseTls = False,
    ca: Ca = None,
    cert: Cert = None,
    cert_key: CertKey = None,
    with_parent: Annotated[
        bool, typer.Option("--with-parent", hidden=True, help="End when standard input ends.")
    ] = False,
) -> None:
    """Answer OpenAI's HTTP API for a gRPC server, until Ctrl-C.

    `concertina serve` starts one by itself. Start others, anywhere, for more callers; keys that
    callers send as `Authorization: Bearer` are passed on.

    Examples:
    concertina gateway --upstream 127.0.0.1:9000
    concertina gateway --upstream models.example:9000 --tls --host 0.0.0.0 --port 8080
    """
    settings = GatewaySettings(
        upstream=upstream,
        upstream_tls=access(None, tls, ca, cert, cert_key).tls,
        host=host,
        port=port,
        tls=tls_config(tls_cert, tls_key, tls_client_ca),
        allowed_hosts=tuple(allow_host or ()),
        drain_seconds=drain_seconds,
        max_body_bytes=max_body_bytes,
        streams_per_key=streams_per_key,
        slow_reader_seconds=slow_reader_seconds,
        with_parent=with_parent,
    )
    if settings.tls is not None:
        require_usable(settings.tls)
    from server.http.process import serve

    log_to_stderr()
    console = plain_console()

    def announce() -> None:
        if not with_parent:
            console.print(f"ready: {settings.url}/v1 for {settings.upstream}")

    serve(settings, announce)
