"""The command `prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from concertina.cli.output import plain_console
from server.hosts.sources import prepared


def prepare(
    source: Annotated[
        Path, typer.Argument(help="Hugging Face folder, GGUF file, or OWNER/NAME of a hub.")
    ],
    bundle: Annotated[
        Path, typer.Argument(help="Folder to write; its name is the model's in requests.")
    ],
    state: Annotated[
        Literal["float32", "float16"],
        typer.Option(help="Type of the caches; a GPU needs float16."),
    ] = "float32",
) -> None:
    """Make the bundle of a pretrained model, unless it is there.

    It converts and exports, which takes minutes and the extra `train`, for a server elsewhere that
    has neither. A bundle that is there is verified; one that is damaged, or was made of something
    else, is made again. A model of a hub is fetched once: remove its bundle to fetch it again.

    Examples:
    concertina prepare HuggingFaceTB/SmolLM2-135M-Instruct bundles/smollm2
    concertina prepare models/SmolLM2-135M-Instruct.Q4_1.gguf bundles/smollm2
    """
    made = prepared(source, bundle, state, plain_console(stderr=True).print)
    plain_console().print(f"{bundle}: ready, fingerprint {made.fingerprint[:16]}")
