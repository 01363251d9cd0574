"""The commands `models`, which lists what a server serves, and `tokenize`, which shows tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.filesize import decimal
from rich.table import Table

from concertina.cli.connection import LOOKUP_TIMEOUT_S, Server, choose_model, connected
from concertina.cli.inputs import read_text
from concertina.cli.options import (
    Json,
    ModelName,
    Timeout,
)
from concertina.cli.output import print_whole
from concertina.cli.printing import event_json
from concertina.client import Model


def models(
    server: Server,
    json_output: Json = False,
) -> None:
    """List what a server serves.

    Examples:
    concertina models
    concertina models --json | jq .name
    CONCERTINA_ADDRESS=127.0.0.1:9001 concertina models
    """
    with connected(server, json_output) as client:
        served = client.models(timeout=LOOKUP_TIMEOUT_S)
    if json_output:
        for model in served:
            print(event_json(asdict(model)))
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("model", "writes", "attention"):
        table.add_column(heading, no_wrap=True)
    for heading in ("parameters", "context", "state", "held-out"):
        table.add_column(heading, justify="right", no_wrap=True)
    for model in served:
        table.add_row(
            model.name,
            model.modality,
            model.attention,
            f"{model.parameters / 1e6:.1f} M",
            f"{model.context:,}",
            decimal(model.max_state_bytes),
            "\n".join(_heldout(model)),
        )
    print_whole(table)


def _heldout(model: Model) -> Iterator[str]:
    series = [name for name in model.metrics if any(map(str.isdigit, name))]  # at a length, say
    for name, value in model.metrics.items():
        if name not in series:
            yield f"{value:.3f} {name}"
    if series:
        yield f"and {len(series)} more with --json"
    if model.weights.startswith("int"):
        yield f"{model.weights_loss:+.3f} as {model.weights}"
    if model.state == "int8":
        yield f"{model.state_loss:+.3f} with int8 state"


def tokenize(
    text: Annotated[str, typer.Argument(help="Text to take apart; - reads it from stdin.")],
    timeout: Timeout = None,
    model: ModelName = "",
    *,
    server: Server,
    json_output: Json = False,
) -> None:
    """Show the tokens that a model takes a text for: a line for each, with its id and its bytes.

    What is no text, as a special token, has no bytes.

    Examples:
    concertina tokenize "Hello world"
    concertina tokenize - --json < main.py
    """
    content = read_text(Path(text)) if text == "-" else text
    with connected(server, json_output) as client:
        chosen = choose_model(client, model, "text")
        tokens = client.tokenize(content, model=chosen.name, timeout=timeout)
    for token, piece in zip(tokens.ids, tokens.pieces, strict=True):
        if json_output:
            print(event_json({"id": token, "bytes": piece}))
        else:
            print(f"{token:7d} {repr(piece)[1:]}")
