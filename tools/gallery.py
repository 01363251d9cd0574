"""Pictures for the documents, painted by a server: a sheet of samples, completions, a painting."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import numpy as np
import numpy.typing as npt
import typer
from PIL import Image

from concertina.client import DEFAULT_ADDRESS, AsyncClient, ImageFormat, Model, Tokens
from concertina.codecs.image_files import MOST_PIXELS, most_scale
from model.data import load_dataset

Pixels = npt.NDArray[np.uint8]
"""Colours `[height, width, 3]`."""
Paint: TypeAlias = Callable[[AsyncClient, Model, ImageFormat], Awaitable[list[Pixels]]]

BLANK = 0.98
"""A picture of which a larger share has a single colour shows nothing."""
NOT_PAINTED = (228, 228, 232)
_HOLD_MS = 2500

Address = Annotated[str, typer.Option(help="Server.")]
Name = Annotated[str, typer.Option("--model", help="Model; not needed when there is one.")]
Scale = Annotated[int, typer.Option(min=1, help="Pixels of the file per pixel painted.")]
Temperature = Annotated[float, typer.Option(help="Temperature.")]

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def sheet(
    out: Annotated[Path, typer.Argument(help="PNG to write.")],
    count: Annotated[int, typer.Option(min=1, help="Samples.")] = 64,
    columns: Annotated[int, typer.Option(min=1, help="Samples per row.")] = 16,
    scale: Scale = 2,
    temperature: Temperature = 1.0,
    model: Name = "",
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Samples without selection: seeds 0, 1, 2, …, labels in turn. Says how many are blank.

    python -m tools.gallery sheet docs/images/emoji-32.png --temperature 0.9
    """

    async def paint(client: AsyncClient, model: Model, size: ImageFormat) -> list[Pixels]:
        check_size(size, count, columns, scale)

        def label(seed: int) -> str | None:
            return model.labels[seed % len(model.labels)] if model.labels else None

        return await asyncio.gather(
            *(_painted(client, model, label(seed), seed, temperature) for seed in range(count))
        )

    images = asyncio.run(_on(address, model, paint))
    _enlarged(grid(images, columns), scale).save(out)
    print(f"{out}: {count} samples, {sum(map(is_blank, images))} of them blank")


@app.command()
def completions(
    out: Annotated[Path, typer.Argument(help="PNG to write.")],
    data: Annotated[Path, typer.Argument(help="Dataset whose held-out pictures are completed.")],
    pictures: Annotated[list[int], typer.Argument(help="Their numbers; each is a row.")],
    count: Annotated[int, typer.Option(min=1, help="Completions of each.")] = 4,
    scale: Scale = 3,
    temperature: Temperature = 1.0,
    model: Name = "",
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """The upper half of held-out pictures, some completions of it (seeds 0, 1, …), and the whole.

    python -m tools.gallery completions docs/images/completions.png data/emoji 3 17
    """
    held = load_dataset(data)
    palette = np.array(held.info.palette, np.uint8)
    shape = (held.info.image_height, held.info.image_width, 3)
    given = shape[0] // 2

    async def paint(client: AsyncClient, model: Model, size: ImageFormat) -> list[Pixels]:
        if palette.tobytes() != size.palette:
            raise typer.BadParameter(f"{data} has another palette than {model.name}")
        check_size(size, len(pictures) * (count + 2), count + 2, scale)
        cells: list[Pixels] = []
        for number in pictures:
            label, *indices = held.heldout[number].tolist()
            whole = palette[indices].reshape(shape)
            name = model.labels[label] if label >= 0 else None
            completed = await asyncio.gather(
                *(
                    _painted(client, model, name, seed, temperature, whole[:given])
                    for seed in range(count)
                )
            )
            cells += [unfinished(whole, given * shape[1]), *completed, whole]
        return cells

    cells = asyncio.run(_on(address, model, paint))
    _enlarged(grid(cells, count + 2), scale).save(out)


@app.command()
def painting(
    out: Annotated[Path, typer.Argument(help="GIF to write.")],
    seeds: Annotated[list[int], typer.Argument(help="Seeds; each is a picture, side by side.")],
    label: Annotated[str | None, typer.Option(help="Label; without, each in turn.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames until it is finished.")] = 64,
    seconds: Annotated[float, typer.Option(help="Time until it is finished.")] = 4.0,
    scale: Scale = 6,
    temperature: Temperature = 1.0,
    model: Name = "",
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Pictures while they are painted, pixel by pixel; the finished ones stay for a moment.

    python -m tools.gallery painting docs/images/painting.gif 0 1 2 3
    """

    async def paint(client: AsyncClient, model: Model, size: ImageFormat) -> list[Pixels]:
        check_size(size, len(seeds), len(seeds), scale)

        def chosen(seed: int) -> str | None:
            return label or (model.labels[seed % len(model.labels)] if model.labels else None)

        return await asyncio.gather(
            *(_painted(client, model, chosen(seed), seed, temperature) for seed in seeds)
        )

    images = asyncio.run(_on(address, model, paint))
    shown = [
        _enlarged(grid([unfinished(image, at) for image in images], len(images)), scale)
        for at in steps(images[0].shape[0] * images[0].shape[1], frames)
    ]
    # All frames share a palette: each of its own would be as large as the pixels of a small frame.
    both = Image.fromarray(np.vstack([np.asarray(shown[0]), np.asarray(shown[-1])]))
    palette = both.quantize(256, dither=Image.Dither.NONE)
    first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in shown)
    first.save(
        out,
        save_all=True,
        append_images=rest,
        duration=[round(1000 * seconds / frames)] * len(rest) + [_HOLD_MS],
        loop=0,
        optimize=False,
    )


def check_size(image: ImageFormat, count: int, columns: int, scale: int) -> None:
    """Raises BadParameter if a sheet of `count` images would be too large."""
    rows = -(-count // columns)
    most = most_scale(columns * (image.width + 2), rows * (image.height + 2))
    if scale > most:
        raise typer.BadParameter(
            f"{count} samples in {columns} columns, {scale} times as large, are more than "
            f"{MOST_PIXELS:,} pixels: use at most --scale {most}, or fewer samples and columns"
        )


def grid(images: Sequence[Pixels], columns: int) -> Pixels:
    """The images in rows of `columns`, with a white border of one pixel around each."""
    height, width, _ = images[0].shape
    rows = -(-len(images) // columns)
    cells = np.full((rows, height + 2, columns, width + 2, 3), 255, np.uint8)
    for index, image in enumerate(images):
        cells[index // columns, 1:-1, index % columns, 1:-1] = image
    return cells.reshape(rows * (height + 2), -1, 3)


def unfinished(image: Pixels, painted: int) -> Pixels:
    """The image when only so many pixels are painted, in raster order."""
    flat = image.reshape(-1, 3).copy()
    flat[painted:] = NOT_PAINTED
    return flat.reshape(image.shape)


def steps(pixels: int, frames: int) -> list[int]:
    """How many pixels are painted in each frame: none in the first, all in the last."""
    return [round(pixels * frame / frames) for frame in range(frames + 1)]


def is_blank(image: Pixels) -> bool:
    """Whether a single colour covers more than `BLANK` of the image."""
    _, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    return bool(counts.max() > BLANK * counts.sum())


def _enlarged(image: Pixels, scale: int) -> Image.Image:
    whole = Image.fromarray(image)
    return whole.resize((whole.width * scale, whole.height * scale), Image.Resampling.NEAREST)


async def _on(address: str, name: str, paint: Paint) -> list[Pixels]:
    async with AsyncClient(address) as client:
        model = await client.model(name)
        if model.image is None:
            raise typer.BadParameter(f"{model.name} does not make images")
        return await paint(client, model, model.image)


async def _painted(
    client: AsyncClient,
    model: Model,
    label: str | None,
    seed: int,
    temperature: float,
    rows: Pixels | None = None,
) -> Pixels:
    """One picture; `rows` are its upper rows, if they are given."""
    assert model.image is not None
    stream = client.generate(
        rows, model=model.name, label=label, seed=seed, temperature=temperature
    )
    rgb = b"" if rows is None else rows.tobytes()
    rgb += b"".join([event.rgb async for event in stream if isinstance(event, Tokens)])
    return np.frombuffer(rgb, np.uint8).reshape(model.image.height, model.image.width, 3)


if __name__ == "__main__":
    app()
