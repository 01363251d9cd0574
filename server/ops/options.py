"""Command-line options that the commands of servers share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from server.config import RANGES


def number(setting: str, help: str) -> Any:
    """An option for a number, with the range that the configuration gives it."""
    lowest, highest = RANGES[setting]
    return typer.Option(min=lowest, max=highest, help=help)


Host: TypeAlias = Annotated[
    str, typer.Option(help="Address to listen on; 0.0.0.0 or :: opens the port to the network.")
]
TlsCert: TypeAlias = Annotated[
    Path | None, typer.Option(help="Certificate chain (PEM). The port then accepts TLS only.")
]
TlsKey: TypeAlias = Annotated[
    Path | None, typer.Option(help="Private key (PEM) of the certificate.")
]
TlsClientCa: TypeAlias = Annotated[
    Path | None, typer.Option(help="CA (PEM) of the certificates that callers must present.")
]
