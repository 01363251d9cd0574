"""The command `score`: measures how well a model predicts a file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from concertina.cli.connection import Server, choose_model, connected, image_format, modalities
from concertina.cli.inputs import image_of, read_input, rows_of, text_of
from concertina.cli.options import (
    Json,
    Label,
    ModelName,
    Timeout,
    file_or_dataset,
)
from concertina.cli.output import counted
from concertina.cli.windows import (
    HeldOut,
    Window,
    heldout_windows,
    read_heldout,
    score_all,
    spread,
    text_windows,
)
from concertina.client import Client, InvalidRequest, Model, Score
from concertina.client.requests import PromptLike


def score(
    file: Annotated[
        Path,
        typer.Argument(
            callback=file_or_dataset,
            help="Text, image, or dataset made by `concertina data`; - reads a file from stdin.",
        ),
    ],
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens between two windows; default: the context."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most windows to score, spread over all of them.")
    ] = None,
    label: Label = None,
    timeout: Timeout = None,
    model: ModelName = "",
    *,
    server: Server,
    json_output: Json = False,
) -> None:
    """Measure how well a model predicts a text (bits per byte) or an image (bits per dimension).

    Nothing is generated. Fewer bits are better; a model that knows nothing needs 8 for a byte.
    The model decides whether the file is a text or an image. If models of both kinds are served
    and none is named, a file that can be opened as an image is one.

    A text longer than the model's context is scored in windows, and so is the held-out part of a
    dataset; the bits are those of all tokens, each counted once. With a --stride below the context,
    windows overlap: a token sees more of what is before it, and it takes longer. What takes long
    says on stderr how far it is.

    Examples:
    concertina score main.py
    concertina score image.png --label "Food & Drink" --json
    concertina score book.txt --stride 2048
    concertina score data/notes --limit 100
    """
    with connected(server, json_output) as client:
        chosen, prompt = _model_and_prompt(client, model, file)
        windows = _windows(client, chosen, prompt, stride)
        if windows:
            _score_windows(client, chosen, spread(windows, limit), label, timeout, json_output)
            return
        if isinstance(prompt, HeldOut):
            raise InvalidRequest(f"{file} has no held-out tokens: make it of more data")
        result = client.score(prompt, model=chosen.name, label=label, timeout=timeout)
    if json_output:
        told = {name: value for name, value in asdict(result).items() if value is not None}
        print(json.dumps(told))
    else:
        tokens = f"{len(result.bits):,} tokens"
        bits = result.bits_per_byte or result.bits_per_token
        print(f"{bits:.4f} {_unit(chosen)} over {tokens} ({result.model})")


def _unit(model: Model) -> str:
    return "bits/dim" if model.modality == "image" else "bits/byte"


def _windows(
    client: Client, model: Model, prompt: PromptLike | HeldOut, stride: int | None
) -> list[Window]:
    """The windows of a dataset or of a text longer than the context; none of one prompt."""
    if isinstance(prompt, HeldOut):
        return list(heldout_windows(prompt, model, stride or model.context))
    if not isinstance(prompt, str) or not prompt:
        return []
    context, content = model.context, prompt.encode()
    if not model.has_tokenizer:
        whole = len(content) <= context
        return [] if whole else list(text_windows(content, context, stride or context))
    tokens = client.tokenize(prompt, model=model.name)  # there may be more of them than bytes
    if len(tokens.ids) <= context:
        return []
    sizes = [*map(len, tokens.pieces)]
    # A tokenizer may put a space before the text.
    sizes[0] -= tokens.pieces[0].startswith(b" ") and not content.startswith(b" ")
    shared = 0 if model.counts_first_token else 1
    ids = np.array(tokens.ids)
    return list(text_windows(ids, context, stride or context, sizes, shared))


def _score_windows(
    client: Client,
    model: Model,
    windows: list[Window],
    label: str | None,
    timeout: float | None,
    json_output: bool,
) -> None:
    def ask(window: Window) -> Score:
        return client.score(
            window.tokens, model=model.name, label=window.label or label, timeout=timeout
        )

    bits, tokens, size = 0.0, 0, 0

    def note(window: Window, result: Score) -> None:
        nonlocal bits, tokens, size
        new = min(window.new, len(result.bits))  # a first token may be what others follow from
        bits += sum(result.bits[-new:])
        tokens += new
        size += sum(window.sizes[-new:]) if window.sizes else new
        count(f"{bits / size:.4f} {_unit(model)} so far")

    with counted(len(windows), "windows") as count:
        scores = score_all(windows, ask, note)
    fingerprint = scores[-1].fingerprint
    if json_output:
        found = {"model": model.name, "fingerprint": fingerprint, "bits_per_token": bits / tokens}
        if model.has_tokenizer:
            found["bits_per_byte"] = bits / size
        print(json.dumps({**found, "tokens": tokens, "windows": len(windows)}))
    else:
        pieces = "1 window" if len(windows) == 1 else f"{len(windows):,} windows"
        over = f"{tokens:,} tokens in {pieces}"
        print(f"{bits / size:.4f} {_unit(model)} over {over} ({model.name})")


def _model_and_prompt(client: Client, name: str, file: Path) -> tuple[Model, PromptLike | HeldOut]:
    """The model to ask, and what `file` is to it. Raises InvalidRequest for neither image nor text.

    name: of the model; if empty, there has to be one that fits.
    """
    if file.is_dir():
        heldout = read_heldout(file)
        return choose_model(client, name, heldout.modality), heldout
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
