"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from concertina.cli.output import plain_console
from concertina.codecs.tokenizer_file import TOKENIZER
from concertina.v1 import bundle_pb2 as pb
from export.bundle import (
    LossError,
    Precision,
    StatePrecision,
    export_bundle,
    loss_unit,
    weights_type,
)
from export.parity import ParityError
from model.data import load_dataset
from model.run import CONFIG, read_origin

_DATA_TYPES = {
    "float32": pb.DATA_TYPE_FLOAT32,
    "float16": pb.DATA_TYPE_FLOAT16,
    "int8": pb.DATA_TYPE_FLOAT32,  # first, to compare with
}


def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder of a run, from `concertina train` or `convert`.")
    ],
    bundle: Annotated[Path, typer.Argument(help="Folder to write; an old bundle is replaced.")],
    name: Annotated[
        str, typer.Option(help="Name of the model in requests; default: the folder's name.")
    ] = "",
    version: Annotated[str, typer.Option(help="Version of the model; free text.")] = "1",
    weights: Annotated[
        Literal["float16", "int8", "int4"],
        typer.Option(
            help="Type of the stored matrices; float16 leaves those of a converted model as they "
            "are."
        ),
    ] = "float16",
    state: Annotated[
        Literal["float32", "float16", "int8"],
        typer.Option(help="Type of the caches; a GPU needs float16, and int8 is for CPUs only."),
    ] = "float32",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Dataset of the model, or of any text for a converted one; its held-out part "
            "measures the loss of int8 and int4, and its training part the range of int8 caches."
        ),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Largest loss in bits per held-out byte or pixel, of weights and of caches each; "
            "default: int8 weights 0.02, int4 weights 0.1, int8 caches 0.01.",
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
    concertina export runs/python bundles/python-8 --weights int8 --state int8 --data data/python
    concertina export runs/python bundles/python-gpu --state float16
    concertina export runs/smollm2 bundles/smollm2-int8 --weights int8 --data data/notes
    """
    rounded = [f"{weights} weights"] * (weights != "float16") + ["int8 caches"] * (state == "int8")
    if rounded and data is None:
        raise typer.BadParameter(
            f"{' and '.join(rounded)} need a dataset to measure the loss: add --data"
        )
    if not rounded and (data, max_loss) != (None, None):
        raise typer.BadParameter(
            "--data and --max-loss need --weights int8 or int4, or --state int8"
        )
    console = plain_console(stderr=True)
    try:
        _require_tokens(checkpoint)
        with console.status("reading the checkpoint") as status:
            precision = state_precision = None
            if data is not None:
                dataset = load_dataset(data)
                if weights != "float16":
                    precision = Precision(int(weights.removeprefix("int")), dataset, max_loss)
                if state == "int8":
                    state_precision = StatePrecision(dataset, max_loss)
            manifest = export_bundle(
                checkpoint,
                bundle,
                name=name or bundle.resolve().name,
                version=version,
                precision=precision,
                state_precision=state_precision,
                data_type=_DATA_TYPES[state],
                on_stage=status.update,
            )
    except (FileExistsError, FileNotFoundError, LossError, ParityError, ValueError) as error:
        console.print(Text.assemble(("error: ", "bold red"), str(error)))
        raise typer.Exit(1) from None
    _report(bundle, weights, manifest, console)


def _require_tokens(run: Path) -> None:
    """Raise ValueError for a converted model without its tokenizer: no server takes its bundle."""
    converted = (run / CONFIG).exists() and read_origin(run) is not None
    if converted and not (run / TOKENIZER).exists():
        raise ValueError(
            f"{run} has no {TOKENIZER}, and without it no bundle can be served: save the "
            "tokenizer beside the weights that were converted, with transformers' "
            "save_pretrained, and convert the model again"
        )


def _report(bundle: Path, weights: str, manifest: pb.Manifest, console: Console) -> None:
    size = sum(file.bytes for file in manifest.files)
    parity = manifest.parity
    console.print(
        f"{bundle}: {size / 1e6:.1f} MB, {manifest.parameters / 1e6:.2f}M parameters; "
        f"largest difference {parity.max_error:.1e} over {parity.positions:,} positions",
    )
    if manifest.HasField("quantisation"):
        measured = manifest.quantisation
        console.print(
            f"{weights}: {measured.heldout:.4f} bits per held-out {loss_unit(manifest)}, "
            f"{measured.heldout - measured.heldout_float16:+.4f} against {weights_type(manifest)}, "
            f"over {measured.tokens:,} tokens",
        )
    if manifest.HasField("state_quantisation"):
        of_state = manifest.state_quantisation
        console.print(
            f"int8 caches: {of_state.heldout:.4f} bits per held-out {loss_unit(manifest)}, "
            f"{of_state.heldout - of_state.heldout_float32:+.4f} against float32, "
            f"over {of_state.tokens:,} tokens",
        )
