"""Command-line options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer


def png_file(path: Path | None) -> Path | None:
    """A callback: the path, if a PNG can be written there. Raises BadParameter."""
    if path is not None and path.suffix.lower() != ".png":
        raise typer.BadParameter(f"{path} does not end in .png, the only format written")
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"{path.parent} is not a folder")
    return path


def readable_file(path: Path) -> Path:
    """A callback: the path of a file, or `-`. Raises BadParameter."""
    if path != Path("-") and not path.is_file():
        raise typer.BadParameter(f"{path} is not a file")
    return path


Address: TypeAlias = Annotated[
    str, typer.Option(envvar="CONCERTINA_ADDRESS", help="Where the server listens.")
]
ModelName: TypeAlias = Annotated[
    str,
    typer.Option("--model", "-m", help="Name of the model; not needed if only one is served."),
]
Label: TypeAlias = Annotated[
    str | None, typer.Option(help="One of the model's labels. Without one: unconditional.")
]
Temperature: TypeAlias = Annotated[
    float | None,
    typer.Option("--temperature", "-t", min=0, help="0 always takes the likeliest token."),
]
TopK: TypeAlias = Annotated[
    int | None, typer.Option(min=0, help="Keep this many of the likeliest tokens; 0 keeps all.")
]
TopP: TypeAlias = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Keep the likeliest tokens that reach this probability."),
]
MinP: TypeAlias = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Keep tokens this probable relative to the likeliest."),
]
Seed: TypeAlias = Annotated[
    int | None, typer.Option(min=0, help="The same seed and prompt give the same stream.")
]
TimeLimit: TypeAlias = Annotated[
    float | None, typer.Option(min=0, help="Seconds after which to end, with what is there.")
]
Timeout: TypeAlias = Annotated[
    float | None, typer.Option(min=0, help="Seconds after which to give up and fail.")
]
Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print JSON, one object per line; errors to stderr.")
]
