"""Pictures for the documents show what a server painted, where it belongs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from concertina.client import Client, ImageFormat, Tokens
from model.data import Dataset, DatasetInfo, save_dataset
from tests.bundles import HEIGHT, LABELS, PALETTE, WIDTH
from tests.server.http.gateways import serving
from tools.gallery import NOT_PAINTED, app, check_size, grid, is_blank, steps, unfinished

IMAGE = ImageFormat(width=30, height=14, palette=b"")


def test_a_sheet_has_a_largest_scale() -> None:
    check_size(IMAGE, count=7, columns=4, scale=128)
    with pytest.raises(typer.BadParameter, match=r"in 4 columns, 129 times as large.*128"):
        check_size(IMAGE, count=7, columns=4, scale=129)
    with pytest.raises(typer.BadParameter, match="or fewer samples and columns"):
        check_size(IMAGE, count=1, columns=10_000_000, scale=1)


def test_images_lie_in_rows_with_a_border() -> None:
    images = [np.full((2, 3, 3), shade, np.uint8) for shade in (10, 20, 30)]
    cells = grid(images, 2)
    assert cells.shape == (8, 10, 3)
    assert cells[1:3, 1:4].max() == 10 and cells[1:3, 6:9].max() == 20
    assert cells[5:7, 1:4].max() == 30 and cells[5:7, 6:9].min() == 255
    for at in (0, 3, 4, 7):
        assert cells[at].min() == 255
    for at in (0, 4, 5, 9):
        assert cells[:, at].min() == 255


def test_what_is_not_painted_yet_is_grey() -> None:
    image = np.zeros((2, 4, 3), np.uint8)
    half = unfinished(image, 5).reshape(-1, 3)
    assert not half[:5].any() and (half[5:] == NOT_PAINTED).all()
    assert not image.any()


def test_the_first_frame_is_empty_and_the_last_is_whole() -> None:
    assert steps(1024, 64)[:2] == [0, 16] and steps(1024, 64)[-1] == 1024
    assert steps(64, 5) == [0, 13, 26, 38, 51, 64]


def test_a_picture_of_hardly_more_than_one_colour_is_blank() -> None:
    image = np.zeros((10, 10, 3), np.uint8)
    image[0, 0] = 255
    assert is_blank(image)
    image[0, 1] = 255  # 98% of one colour, and no more
    assert not is_blank(image)


@pytest.fixture(scope="module")
def address(image_bundle: Path) -> Iterator[str]:
    with serving(image_bundle) as address:
        yield address


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def painted(address: str, seed: int, label: str, rows: np.ndarray | None = None) -> np.ndarray:
    """What the server paints, `[height, width, 3]`, asked for one picture at a time."""
    with Client(address) as client, client.generate(rows, label=label, seed=seed) as stream:
        rgb = b"".join(event.rgb for event in stream if isinstance(event, Tokens))
    return np.frombuffer(rgb, np.uint8).reshape(-1, WIDTH, 3)


def cell(file: Path, row: int, column: int, scale: int) -> np.ndarray:
    """One image of a grid, at its own size."""
    whole = np.asarray(Image.open(file).convert("RGB"))[scale // 2 :: scale, scale // 2 :: scale]
    top, left = row * (HEIGHT + 2) + 1, column * (WIDTH + 2) + 1
    return whole[top : top + HEIGHT, left : left + WIDTH]


def test_a_sheet_has_every_seed_and_the_labels_in_turn(address: str, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    told = run("sheet", str(out), "--count", "5", "--columns", "3", "--address", address)
    assert told == f"{out}: 5 samples, 0 of them blank\n"
    for seed in range(5):
        expected = painted(address, seed, LABELS[seed % 3])
        assert (cell(out, seed // 3, seed % 3, scale=2) == expected).all(), seed


def test_completions_begin_with_the_upper_half(address: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(16, size=(3, 1 + WIDTH * HEIGHT)).astype(np.int16)
    rows[:, 0] = [0, 2, 1]
    info = DatasetInfo("image", 16, "random", "CC0-1.0", WIDTH, HEIGHT, PALETTE, LABELS)
    save_dataset(tmp_path / "data", Dataset(info, rows, rows))
    out = tmp_path / "completions.png"
    data = str(tmp_path / "data")
    run("completions", str(out), data, "1", "2", "--count", "2", "--address", address)
    for row, (number, label) in enumerate([(1, LABELS[2]), (2, LABELS[1])]):
        whole = np.array(PALETTE, np.uint8)[rows[number, 1:]].reshape(HEIGHT, WIDTH, 3)
        upper = whole[: HEIGHT // 2]
        given, *completed, last = (cell(out, row, column, scale=3) for column in range(4))
        assert (given[: HEIGHT // 2] == upper).all() and (given[HEIGHT // 2 :] == NOT_PAINTED).all()
        assert (last == whole).all()
        for seed, image in enumerate(completed):
            assert (image[: HEIGHT // 2] == upper).all()
            assert (image[HEIGHT // 2 :] == painted(address, seed, label, upper)).all()


def test_completions_want_the_palette_of_the_model(address: str, tmp_path: Path) -> None:
    info = DatasetInfo("image", 16, "random", "CC0-1.0", WIDTH, HEIGHT, PALETTE[::-1], LABELS)
    rows = np.zeros((2, 1 + WIDTH * HEIGHT), np.int16)
    save_dataset(tmp_path, Dataset(info, rows, rows))
    arguments = ("completions", str(tmp_path / "out.png"), str(tmp_path), "0", "--address", address)
    done = CliRunner().invoke(app, arguments)
    told = " ".join(done.output.replace("│", " ").split())  # it is framed, and broken into lines
    assert done.exit_code == 2 and "has another palette than tiny-image" in told
    assert not (tmp_path / "out.png").exists()


def test_a_painting_fills_up_pixel_by_pixel(address: str, tmp_path: Path) -> None:
    out = tmp_path / "painting.gif"
    run("painting", str(out), "4", "6", "--frames", "4", "--address", address)
    finished = grid([painted(address, 4, LABELS[1]), painted(address, 6, LABELS[0])], 2)
    with Image.open(out) as gif:
        assert gif.n_frames == 5 and gif.info["loop"] == 0
        for frame in range(5):
            gif.seek(frame)
            shown = np.asarray(gif.convert("RGB"))[3::6, 3::6]
            grey = (shown == NOT_PAINTED).all(axis=2)
            assert grey.sum() == 2 * WIDTH * HEIGHT * (4 - frame) // 4
            assert (shown[~grey] == finished[~grey]).all()
