"""`concertina export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from export.bundle import export_bundle
from export.parity import ParityError


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run of `concertina train`.")],
    bundle: Annotated[Path, typer.Argument(help="Folder to write; replaced when it exists.")],
    name: Annotated[str, typer.Option(help="Name to serve it by; default: the folder's.")] = "",
    version: Annotated[str, typer.Option(help="Free text.")] = "1",
) -> None:
    """Turn a checkpoint into a bundle, and prove that both compute the same.

    Every prefix length up to three blocks, several chunkings and mixed batches are compared with
    the trained model in float64; nothing is written when a logit differs by more than 1e-4.

    Examples:
    concertina export runs/python bundles/python-4k
    concertina export runs/notes bundles/notes --name notes --version 2026-11
    """
    console = Console(stderr=True)
    try:
        with console.status("reading the checkpoint") as status:
            manifest = export_bundle(
                checkpoint,
                bundle,
                name=name or bundle.resolve().name,
                version=version,
                on_stage=status.update,
            )
    except (FileExistsError, FileNotFoundError, ParityError, ValueError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(1) from None
    size = sum(file.bytes for file in manifest.files)
    parity = manifest.parity
    console.print(
        f"{bundle}: {size / 1e6:.1f} MB, {manifest.parameters / 1e6:.2f}M parameters; "
        f"largest difference {parity.max_error:.1e} over {parity.positions:,} positions",
        highlight=False,
    )
