"""The command `tokenize`: shows the tokens of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from concertina.cli.connection import choose_model, connected
from concertina.cli.inputs import read_text
from concertina.cli.options import (
    Address,
    Ca,
    Cert,
    CertKey,
    Json,
    KeyFile,
    ModelName,
    Timeout,
    UseTls,
    access,
)
from concertina.cli.printing import event_json
from concertina.client import DEFAULT_ADDRESS


def tokenize(
    text: Annotated[str, typer.Argument(help="Text to take apart; - reads it from stdin.")],
    timeout: Timeout = None,
    model: ModelName = "",
    address: Address = DEFAULT_ADDRESS,
    key_file: KeyFile = None,
    tls: UseTls = False,
    ca: Ca = None,
    cert: Cert = None,
    cert_key: CertKey = None,
    json_output: Json = False,
) -> None:
    """Show the tokens that a model takes a text for: a line for each, with its id and its bytes.

    What is no text, as a special token, has no bytes.

    Examples:
    concertina tokenize "Hello world"
    concertina tokenize - --json < main.py
    """
    content = read_text(Path(text)) if text == "-" else text
    with connected(address, access(key_file, tls, ca, cert, cert_key), json_output) as client:
        chosen = choose_model(client, model, "text")
        tokens = client.tokenize(content, model=chosen.name, timeout=timeout)
    for token, piece in zip(tokens.ids, tokens.pieces, strict=True):
        if json_output:
            print(event_json({"id": token, "bytes": piece}))
        else:
            print(f"{token:7d} {repr(piece)[1:]}")
