"""A sheet of unselected samples of an image model: seeds 0, 1, 2, …, labels in turn."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from concertina.client import DEFAULT_ADDRESS, AsyncClient, ImageFormat, Tokens
from concertina.codecs.image_files import MOST_PIXELS, most_scale


def contact_sheet(
    out: Annotated[Path, typer.Argument(help="PNG to write.")],
    count: Annotated[int, typer.Option(min=1, help="Samples.")] = 64,
    columns: Annotated[int, typer.Option(min=1, help="Samples per row.")] = 16,
    scale: Annotated[int, typer.Option(min=1, help="Pixels of the PNG per pixel painted.")] = 2,
    temperature: Annotated[float, typer.Option(help="Temperature.")] = 1.0,
    model: Annotated[str, typer.Option(help="Model; not needed when there is one.")] = "",
    address: Annotated[str, typer.Option(help="Server.")] = DEFAULT_ADDRESS,
) -> None:
    """Paint images on a server, all at once, and lay them out in a grid.

    Examples:
    python -m tools.gallery docs/images/emoji-32.png
    python -m tools.gallery sheet.png --count 16 --columns 4 --model emoji-32
    """
    images = asyncio.run(_paint(address, model, count, columns, scale, temperature))
    height, width, _ = images[0].shape
    rows = -(-count // columns)
    sheet = np.full((rows, height + 2, columns, width + 2, 3), 255, np.uint8)
    for index, image in enumerate(images):
        sheet[index // columns, 1:-1, index % columns, 1:-1] = image
    whole = Image.fromarray(sheet.reshape(rows * (height + 2), -1, 3))
    whole.resize((whole.width * scale, whole.height * scale), Image.Resampling.NEAREST).save(out)


def check_size(image: ImageFormat, count: int, columns: int, scale: int) -> None:
    """Raises BadParameter if a sheet of `count` images would be too large."""
    rows = -(-count // columns)
    most = most_scale(columns * (image.width + 2), rows * (image.height + 2))
    if scale > most:
        raise typer.BadParameter(
            f"{count} samples in {columns} columns, {scale} times as large, are more than "
            f"{MOST_PIXELS:,} pixels: use at most --scale {most}, or fewer samples and columns"
        )


async def _paint(
    address: str, name: str, count: int, columns: int, scale: int, temperature: float
) -> list[np.ndarray]:
    async with AsyncClient(address) as client:
        model = await client.model(name)
        assert model.image is not None, f"{model.name} does not make images"
        shape = (model.image.height, model.image.width, 3)
        check_size(model.image, count, columns, scale)

        async def one(seed: int) -> np.ndarray:
            label = model.labels[seed % len(model.labels)] if model.labels else None
            stream = client.generate(
                model=model.name, label=label, seed=seed, temperature=temperature
            )
            rgb = b"".join([event.rgb async for event in stream if isinstance(event, Tokens)])
            return np.frombuffer(rgb, np.uint8).reshape(shape)

        return await asyncio.gather(*(one(seed) for seed in range(count)))


if __name__ == "__main__":
    typer.run(contact_sheet)
