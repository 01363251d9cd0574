"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from concertina.cli.output import plain_console
from concertina.v1 import bundle_pb2 as pb
from export.bundle import LossError, Precision, export_bundle
from export.parity import ParityError
from model.data import load_dataset

_DATA_TYPES = {"float32": pb.DATA_TYPE_FLOAT32, "float16": pb.DATA_TYPE_FLOAT16}


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run of `concertina train`.")],
    bundle: Annotated[Path, typer.Argument(help="Folder to write; an old bundle is replaced.")],
    name: Annotated[
        str, typer.Option(help="Name of the model in requests; default: the folder's name.")
    ] = "",
    version: Annotated[str, typer.Option(help="Version of the model; free text.")] = "1",
    weights: Annotated[
        Literal["float16", "int8", "int4"], typer.Option(help="Type of the stored matrices.")
    ] = "float16",
    state: Annotated[
        Literal["float32", "float16"],
        typer.Option(help="Type of the caches; a GPU needs float16."),
    ] = "float32",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Dataset of the model; its held-out part measures the loss of int8 and int4."
        ),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Largest loss in bits per held-out token; default: int8 0.02, int4 0.1.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Export a checkpoint as a bundle, and check that both compute the same.

    The check compares every prefix length up to three blocks, several chunkings and mixed batches
    with the trained model in float64. Nothing is written if a logit differs by more than 1e-4, or
    with float16 caches by more than 1% of the largest logit.

    Examples:
    concertina export runs/python bundles/python-4k
    concertina export runs/notes bundles/notes --name notes --version 2026-11
    concertina export runs/python bundles/python-int8 --weights int8 --data data/python
    concertina export runs/python bundles/python-gpu --state float16
    """
    if weights != "float16" and data is None:
        raise typer.BadParameter(
            f"{weights} weights need the model's dataset to measure the loss: add --data"
        )
    if weights == "float16" and (data, max_loss) != (None, None):
        raise typer.BadParameter("--data and --max-loss need --weights int8 or int4")
    console = plain_console(stderr=True)
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
        console.print(Text.assemble(("error: ", "bold red"), str(error)))
        raise typer.Exit(1) from None
    size = sum(file.bytes for file in manifest.files)
    parity = manifest.parity
    console.print(
        f"{bundle}: {size / 1e6:.1f} MB, {manifest.parameters / 1e6:.2f}M parameters; "
        f"largest difference {parity.max_error:.1e} over {parity.positions:,} positions",
    )
    if manifest.HasField("quantisation"):
        measured = manifest.quantisation
        console.print(
            f"{weights}: {measured.heldout:.4f} bits per held-out token, "
            f"{measured.heldout - measured.heldout_float16:+.4f} against float16, "
            f"over {measured.tokens:,} tokens",
        )
