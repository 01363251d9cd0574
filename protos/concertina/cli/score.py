"""The command `score`: measures how well a model predicts a file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from concertina.cli.connection import choose_model, connected, image_format, modalities
from concertina.cli.inputs import image_of, read_input, rows_of, text_of
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
from concertina.client import DEFAULT_ADDRESS, Client, InvalidRequest, Model
from concertina.client.requests import PromptLike


def score(
    file: Annotated[
        Path,
        typer.Argument(callback=readable_file, help="Text or image; - reads it from stdin."),
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
    The model decides whether the file is a text or an image. If models of both kinds are served
    and none is named, a file that can be opened as an image is one.

    Examples:
    concertina score main.py
    concertina score image.png --label "Food & Drink" --json
    """
    with connected(address, access(key_file, tls, ca, cert, cert_key), json_output) as client:
        chosen, prompt = _model_and_prompt(client, model, file)
        result = client.score(prompt, model=chosen.name, label=label, timeout=timeout)
    if json_output:
        print(json.dumps(asdict(result)))
    else:
        unit = "bits/dim" if chosen.modality == "image" else "bits/byte"
        tokens = f"{len(result.bits):,} tokens"
        print(f"{result.bits_per_token:.4f} {unit} over {tokens} ({result.model})")


def _model_and_prompt(client: Client, name: str, file: Path) -> tuple[Model, PromptLike]:
    """The model to ask, and what `file` is to it. Raises InvalidRequest for neither image nor text.

    name: of the model; if empty, there has to be one that fits.
    """
    data, kinds = read_input(file), modalities(client, name)
    no_image = ""
    if "image" in kinds:
        try:
            image = image_of(data, file)
        except InvalidRequest as error:
            if "text" not in kinds:
                raise
            no_image = f"{error}; and "
        else:
            chosen = choose_model(client, name, "image")
            return chosen, rows_of(image, file, image_format(chosen))
    try:
        text = text_of(data, file)
    except InvalidRequest as error:
        raise InvalidRequest(f"{no_image}{error}") from None
    return choose_model(client, name, "text"), text
