"""A picture is the same tokens in training data and in a prompt, whatever file it comes from."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from concertina.codecs.pixels import colours_at
from concertina.v1 import bundle_pb2
from concertina.v1 import generation_service_pb2 as pb
from model.images import folder_pictures, image_dataset
from server.api.prompt import prompt_tokens
from server.bundles.bundle import Bundle
from tests.fakes import bare_bundle

SIZE, COUNT = 8, 12


def picture(rng: np.random.Generator, number: int) -> tuple[Image.Image, Image.Exif]:
    """Noise on white: in colour with alpha, grey, or grey of 16 bits; upright, or not."""
    exif = Image.Exif()
    exif[0x0112] = 1 + number % 8
    if number % 3 == 0:
        pixels = rng.integers(0, 256, (SIZE, SIZE, 4)).astype(np.uint8)
        pixels[:, :3, :3] = 255
        pixels[-1, :, 3] = pixels[0, :, 3] = pixels[:, 0, 3] = pixels[:, -1, 3] = 255
    elif number % 3 == 1:
        pixels = rng.integers(0, 256, (SIZE, SIZE)).astype(np.uint8)
    else:
        pixels = rng.integers(0, 1 << 16, (SIZE, SIZE)).astype(np.uint16)
    return Image.fromarray(pixels), exif


@pytest.mark.parametrize("colours", [2, 12, 256])
def test_data_and_prompts_agree(tmp_path: Path, colours: int) -> None:
    rng = np.random.default_rng(colours)
    for number in range(COUNT):
        image, exif = picture(rng, number)
        (tmp_path / f"{number}").mkdir()  # each has a label of its own, which tells them apart
        image.save(tmp_path / f"{number}" / "x.png", exif=exif)
    dataset, _ = image_dataset(
        folder_pictures(tmp_path, (SIZE, SIZE)),
        source="test",
        license="CC0-1.0",
        colours=colours,
        mirror=False,
    )
    bundle = bare_bundle(SIZE, SIZE * SIZE)
    bundle.manifest.modality = bundle_pb2.MODALITY_IMAGE
    bundle.manifest.vocabulary = dataset.info.vocabulary
    bundle.manifest.image.width = bundle.manifest.image.height = SIZE
    bundle.manifest.image.palette = bytes(np.array(dataset.info.palette, np.uint8).tobytes())
    rows = [*dataset.train, *dataset.heldout]
    assert len(rows) == COUNT
    for label, *indices in (row.tolist() for row in rows):
        name = dataset.info.labels[label]
        assert tokens(bundle, (tmp_path / name / "x.png").read_bytes()) == indices
        painted = colours_at(indices, bundle.manifest.image.palette)
        image = Image.frombytes("RGB", (SIZE, SIZE), painted)
        file = io.BytesIO()
        image.save(file, "PNG")
        assert tokens(bundle, file.getvalue()) == indices


def tokens(bundle: Bundle, png: bytes) -> list[int]:
    prompt = pb.Prompt(image=pb.ImageRows(png=png))
    read: list[int] = prompt_tokens(bundle, prompt, room=0).tokens.tolist()
    return read
