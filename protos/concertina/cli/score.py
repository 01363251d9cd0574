"""The command `score`: measures how well a model predicts a file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from concertina.cli.connection import choose_model, connected, image_format
from concertina.cli.inputs import read_rows, read_text
from concertina.cli.options import (
    Address,
    Ca,
    Cert,
    CertKey,
    Json,
    KeyFile,
    Label,
    ModelName,
    Timeout,
    UseTls,
    access,
    readable_file,
)
from concertina.client import DEFAULT_ADDRESS
from concertina.client.requests import PromptLike
from concertina.codecs.pixels import is_image


def score(
    file: Annotated[
        Path,
        typer.Argument(callback=readable_file, help="Text or image; - is text from stdin."),
    ],
    label: Label = None,
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
    """Measure how well a model predicts a text (bits per byte) or an image (bits per dimension).

    Nothing is generated. Fewer bits are better; a model that knows nothing needs 8 for a byte.

    Examples:
    concertina score main.py
    concertina score image.png --label "Food & Drink" --json
    """
    with connected(address, access(key_file, tls, ca, cert, cert_key), json_output) as client:
        if is_image(file):
            chosen, unit = choose_model(client, model, "image"), "bits/dim"
            size = image_format(chosen)
            prompt: PromptLike = read_rows(file, size.width, size.height)
        else:
            chosen, unit = choose_model(client, model, "text"), "bits/byte"
            prompt = read_text(file)
        result = client.score(prompt, model=chosen.name, label=label, timeout=timeout)
    if json_output:
        print(json.dumps(asdict(result)))
    else:
        tokens = f"{len(result.bits):,} tokens"
        print(f"{result.bits_per_token:.4f} {unit} over {tokens} ({result.model})")
