"""`concertina export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from concertina.v1 import bundle_pb2 as pb
from export.bundle import LossError, Precision, export_bundle
from export.parity import ParityError
from model.data import load_dataset

_DATA_TYPES = {"float32": pb.DATA_TYPE_FLOAT32, "float16": pb.DATA_TYPE_FLOAT16}


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run of `concertina train`.")],
    bundle: Annotated[Path, typer.Argument(help="Folder to write; replaced when it exists.")],
    name: Annotated[str, typer.Option(help="Name to serve it by; default: the folder's.")] = "",
    version: Annotated[str, typer.Option(help="Free text.")] = "1",
    weights: Annotated[
        Literal["float16", "int8", "int4"], typer.Option(help="How matrices are stored.")
    ] = "float16",
    state: Annotated[
        Literal["float32", "float16"],
        typer.Option(help="How caches are kept; a GPU takes float16."),
    ] = "float32",
    data: Annotated[
        Path | None,
        typer.Option(help="Dataset of the model: int8 and int4 are measured on what it holds out."),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Most bits per held-out token that int8 (0.02) and int4 (0.1) may cost.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Turn a checkpoint into a bundle, and prove that both compute the same.

    Every prefix length up to three blocks, several chunkings and mixed batches are compared with
    the trained model in float64; nothing is written when a logit differs by more than 1e-4, or with
    caches in float16 by more than 1% of the largest.

    Examples:
    concertina export runs/python bundles/python-4k
    concertina export runs/notes bundles/notes --name notes --version 2026-11
    concertina export runs/python bundles/python-int8 --weights int8 --data data/python
    concertina export runs/python bundles/python-gpu --state float16
    """
    if weights != "float16" and data is None:
        raise typer.BadParameter(
            f"{weights} weights are measured: give the model's dataset, --data"
        )
    if weights == "float16" and (data, max_loss) != (None, None):
        raise typer.BadParameter("--data and --max-loss are for int8 and int4 --weights")
    console = Console(stderr=True)
    try:
        with console.status("reading the checkpoint") as status:
            precision = None
            if data is not None:
                precision = Precision(
                    int(weights.removeprefix("int")), load_dataset(data), max_loss
                )
            manifest = export_bundle(
                checkpoint,
                bundle,
                name=name or bundle.resolve().name,
                version=version,
                precision=precision,
                data_type=_DATA_TYPES[state],
                on_stage=status.update,
            )
    except (FileExistsError, FileNotFoundError, LossError, ParityError, ValueError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(1) from None
    size = sum(file.bytes for file in manifest.files)
    parity = manifest.parity
    console.print(
        f"{bundle}: {size / 1e6:.1f} MB, {manifest.parameters / 1e6:.2f}M parameters; "
        f"largest difference {parity.max_error:.1e} over {parity.positions:,} positions",
        highlight=False,
    )
    if manifest.HasField("quantisation"):
        measured = manifest.quantisation
        console.print(
            f"{weights}: {measured.heldout:.4f} bits per held-out token, "
            f"{measured.heldout - measured.heldout_float16:+.4f} against float16, "
            f"over {measured.tokens:,} tokens",
            highlight=False,
        )
