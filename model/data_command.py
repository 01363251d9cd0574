"""The command `data`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from model import images, text
from model.data import Dataset, save_dataset

_console = Console(stderr=True)


class Kind(enum.StrEnum):
    """Source of a dataset."""

    PYTHON = "python"
    EMOJI = "emoji"
    TEXT = "text"
    IMAGES = "images"


def data(
    kind: Annotated[Kind, typer.Argument(help="Source of the data.")],
    out: Annotated[Path, typer.Argument(help="Folder for the dataset.")],
    folder: Annotated[
        Path | None, typer.Option("--from", help="Folder to read, for text and images.")
    ] = None,
    pattern: Annotated[str, typer.Option(help="Names of the files to read, for text.")] = "*.txt",
    width: Annotated[int, typer.Option(help="Pixels per row, for images.")] = 32,
    height: Annotated[int, typer.Option(help="Rows, for images.")] = 32,
    colours: Annotated[int, typer.Option(min=2, max=256, help="Palette size, for images.")] = 256,
    license: Annotated[str, typer.Option(help="Licence of your data (SPDX).")] = "unknown",
    heldout: Annotated[float, typer.Option(help="Share to hold out of the training.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
) -> None:
    """Prepare training data: bytes of text, or palette indices of images.

    Examples:
    concertina data python data/python
    concertina data emoji data/emoji
    concertina data text data/notes --from ~/notes --pattern '*.md'
    concertina data images data/icons --from ~/icons --width 32 --height 32
    """
    if kind in (Kind.TEXT, Kind.IMAGES) and folder is None:
        raise typer.BadParameter(f"{kind.value} needs a folder to read", param_hint="--from")
    dataset: Dataset
    if kind is Kind.PYTHON:
        dataset = text.python_dataset()
    elif kind is Kind.EMOJI:
        dataset = images.image_dataset(
            images.emoji_pictures(), (32, 32), source="Noto Color Emoji", license="OFL-1.1"
        )
    elif kind is Kind.TEXT:
        assert folder is not None
        files = sorted(path for path in folder.rglob(pattern) if path.is_file())
        dataset = text.text_dataset(
            files, source=folder.name, license=license, heldout=heldout, seed=seed
        )
    else:
        assert folder is not None
        dataset = images.image_dataset(
            images.folder_pictures(folder),
            (width, height),
            source=folder.name,
            license=license,
            colours=colours,
            heldout=heldout,
            seed=seed,
        )
    save_dataset(out, dataset)
    unit = "images" if dataset.info.modality == "image" else "bytes"
    _console.print(
        f"{out}: {len(dataset.train):,} {unit} to train on, {len(dataset.heldout):,} held out"
    )
