"""The command `data`."""

from __future__ import annotations

import enum
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from model import images, text
from model.data import Dataset, check_free, save_dataset

_LONGEST_SIDE = 4096
_console = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


class Kind(enum.StrEnum):
    """Source of a dataset."""

    PYTHON = "python"
    EMOJI = "emoji"
    TEXT = "text"
    IMAGES = "images"


_OWN = (Kind.TEXT, Kind.IMAGES)


def _share(value: float) -> float:
    """A callback: a share of the whole that leaves some of it. Raises BadParameter."""
    if not 0 < value < 1:
        raise typer.BadParameter(f"{value} is not a share: it must lie between 0 and 1, as 0.05")
    return value


def data(
    kind: Annotated[Kind, typer.Argument(help="Source of the data.")],
    out: Annotated[Path, typer.Argument(help="Folder for the dataset.")],
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Folder to read, for text and images; or one file of text."),
    ] = None,
    pattern: Annotated[str, typer.Option(help="Names of the files to read, for text.")] = "*.txt",
    width: Annotated[
        int, typer.Option(min=1, max=_LONGEST_SIDE, help="Pixels per row, for images.")
    ] = 32,
    height: Annotated[int, typer.Option(min=1, max=_LONGEST_SIDE, help="Rows, for images.")] = 32,
    colours: Annotated[
        int, typer.Option(min=2, max=256, help="Most colours of the palette, for images.")
    ] = 256,
    no_mirror: Annotated[
        bool, typer.Option("--no-mirror", help="Add no mirror images to those to train on.")
    ] = False,
    license: Annotated[
        str | None, typer.Option(help="Licence of your data (SPDX).  [default: unknown]")
    ] = None,
    heldout: Annotated[
        float,
        typer.Option(
            callback=_share,
            help="Share to hold out of the training: of the bytes of text, of the images.",
        ),
    ] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split.")] = 0,
) -> None:
    """Prepare training data: bytes of text, or palette indices of images.

    Examples:
    concertina data python data/python
    concertina data emoji data/emoji
    concertina data text data/notes --from ~/notes --pattern '*.md'
    concertina data text data/book --from book.txt --heldout 0.1
    concertina data images data/icons --from ~/icons --width 32 --height 32
    """
    name, licence = _origin(kind, source, license)
    check_free(out, "text" if kind in (Kind.PYTHON, Kind.TEXT) else "image", name)
    dataset: Dataset
    if kind in (Kind.PYTHON, Kind.TEXT):
        if source is None:
            dataset, cut = text.python_dataset(heldout=heldout, seed=seed)
        else:
            files = _files(source, pattern)
            dataset, cut = text.text_dataset(
                files, source=name, license=licence, heldout=heldout, seed=seed
            )
        unit, notes = "bytes", f"; {cut} is split: its end is held out" if cut else ""
    else:
        size = (width, height)
        pictures = (
            images.folder_pictures(source.resolve(), size)
            if source
            else images.emoji_pictures(size)
        )
        dataset, mirrored = images.image_dataset(
            pictures,
            source=name,
            license=licence,
            colours=colours,
            heldout=heldout,
            seed=seed,
            mirror=not no_mirror,
        )
        unit, notes = "images", f"; {dataset.info.vocabulary} colours"
        if mirrored:
            notes += f"; {mirrored:,} are mirror images (--no-mirror adds none)"
    save_dataset(out, dataset)
    _console.print(
        f"{out}: {len(dataset.train):,} {unit} to train on, "
        f"{len(dataset.heldout):,} held out{notes}"
    )


def _origin(kind: Kind, source: Path | None, license: str | None) -> tuple[str, str]:
    """Name and licence of the data. Raises BadParameter for options that do not fit."""
    if kind not in _OWN:
        for option, value in (("--from", source), ("--license", license)):
            if value is not None:
                raise typer.BadParameter(
                    f"is for your own data, text and images, not for {kind.value}: leave it out",
                    param_hint=option,
                )
        if kind is Kind.PYTHON:
            return text.PYTHON_SOURCE, text.PYTHON_LICENSE
        return images.EMOJI_SOURCE, images.EMOJI_LICENSE
    if source is None:
        what = "a folder or a file" if kind is Kind.TEXT else "a folder"
        raise typer.BadParameter(f"{kind.value} needs {what} to read", param_hint="--from")
    if not source.exists():
        raise typer.BadParameter(f"{source} does not exist", param_hint="--from")
    if kind is Kind.IMAGES and not source.is_dir():
        raise typer.BadParameter(
            f"{source} is a file; images are read from a folder", param_hint="--from"
        )
    return source.resolve().name, license or "unknown"


def _files(source: Path, pattern: str) -> list[Path]:
    """The files to read. Raises BadParameter, and says what there is, if none is."""
    if source.is_file():
        return [source]
    try:
        found = sorted(path for path in source.rglob(pattern) if path.is_file())
    except (ValueError, NotImplementedError):
        raise typer.BadParameter(
            f"{pattern!r} is not a pattern of names, as '*.md' is", param_hint="--pattern"
        ) from None
    if found:
        return found
    endings = Counter(path.suffix for path in source.rglob("*") if path.is_file())
    if not endings:
        raise typer.BadParameter(f"{source} has no files", param_hint="--from")
    there = ", ".join(
        f"{count:,} {f'*{ending}' if ending else 'without an ending'}"
        for ending, count in sorted(endings.items(), key=lambda each: (-each[1], each[0]))[:5]
    )
    raise typer.BadParameter(
        f"no file below {source} matches {pattern!r}; there are {there}", param_hint="--pattern"
    )
