"""Pictures to palette indices: split by family, mirrored where that is still of its kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.data import Dataset
from model.images import (
    EMOJI_FONT,
    EMOJI_TEST,
    Picture,
    emoji_family,
    emoji_pictures,
    folder_pictures,
    image_dataset,
)

RED, BLUE, CLEAR = (255, 0, 0, 255), (0, 0, 255, 255), (0, 0, 0, 0)

needs_emoji = pytest.mark.skipif(
    not (EMOJI_FONT.exists() and EMOJI_TEST.exists()),
    reason="needs Debian's fonts-noto-color-emoji and unicode-data",
)


def halves(left: tuple[int, ...], right: tuple[int, ...]) -> Image.Image:
    image = Image.new("RGBA", (8, 8), left)
    image.paste(right, (4, 0, 8, 8))
    return image


def make(pictures: list[Picture], colours: int = 8, heldout: float = 0.2) -> Dataset:
    return image_dataset(
        pictures, (4, 4), source="test", license="CC0-1.0", colours=colours, heldout=heldout
    )


def families(count: int, variants: int, label: str = "shape") -> list[Picture]:
    """Family f is red as far as column f, in `variants` identical pictures."""
    made = []
    for family in range(count):
        image = Image.new("RGBA", (8, 8), "white")
        image.paste(RED, (0, 0, 8, 1 + family))
        made += [Picture(image, label, f"family {family}")] * variants
    return made


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("👍", "👍🏿"),  # skin tone
        ("👨‍⚕️", "👩🏽‍⚕️"),  # man and woman
        ("🧑‍⚕️", "👩‍⚕️"),  # person and woman
        ("🏃‍♀️", "🏃🏻‍♂️"),  # gender signs
        ("🏃‍♀️", "🏃"),
        ("☺️", "☺"),  # presentation
        ("👨‍👩‍👧", "👩‍👩‍👧‍👦"),  # people together are all one family
        ("👩‍❤️‍👨", "👨🏿‍❤️‍👨🏻"),
    ],
)
def test_near_duplicates_share_a_family(one: str, other: str) -> None:
    assert emoji_family([*map(ord, one)]) == emoji_family([*map(ord, other)])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("👍", "👎"),
        ("👨‍⚕️", "👨‍🌾"),
        ("🧑", "🧑‍🦰"),
        ("🇩🇪", "🇫🇷"),  # flags
        ("🇩🇪", "🇪🇩"),
        ("🏴", "🏴‍☠️"),
        ("\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "🏴"),
        ("🏳️", "🏳️‍🌈"),
    ],
)
def test_different_things_do_not(one: str, other: str) -> None:
    assert emoji_family([*map(ord, one)]) != emoji_family([*map(ord, other)])


def test_no_family_lies_on_both_sides() -> None:
    dataset = make(families(8, variants=6), heldout=0.25)
    train = {tuple(row[1:]) for row in dataset.train}
    assert len(dataset.heldout) == 2  # one of a family
    assert not train & {tuple(row[1:]) for row in dataset.heldout}
    assert len(train) == 6


def test_at_most_four_of_a_family_and_their_mirror_images() -> None:
    assert len(make(families(5, variants=6)).train) == 4 * 4 * 2
    assert len(make(families(5, variants=3)).train) == 4 * 3 * 2


@pytest.mark.parametrize(("label", "mirrored"), [("Objects", True), ("Symbols", False)])
def test_mirror_images_keep_their_label(label: str, mirrored: bool) -> None:
    pictures = [Picture(halves(RED, BLUE), label, f"{i}") for i in range(2)]
    pictures += [Picture(halves(RED, BLUE), "Flags", f"flag {i}") for i in range(20)]
    dataset = make(pictures, heldout=0.01)
    wanted = dataset.info.labels.index(label)
    rows = [row[1:].reshape(4, 4) for row in dataset.train if row[0] == wanted]
    assert any(np.array_equal(rows[0][:, ::-1], row) for row in rows) == mirrored


def test_indices_name_the_colours_of_the_picture() -> None:
    dataset = make([Picture(halves(RED, CLEAR), "a", f"{i}") for i in range(4)])
    palette = np.array(dataset.info.palette)
    assert dataset.info.vocabulary == len(palette) == 8
    assert (dataset.info.image_width, dataset.info.image_height) == (4, 4)
    pixels = palette[dataset.train[0, 1:]].reshape(4, 4, 3)
    assert np.abs(pixels[:, 0] - RED[:3]).max() < 40
    assert np.abs(pixels[:, 3] - 255).max() < 40  # what is transparent shows the white behind it


def test_white_is_the_last_colour_and_few_colours_are_enough() -> None:
    for colours in (2, 16, 256):
        info = make(families(5, 1), colours=colours).info
        assert len(info.palette) == colours
        assert info.palette[-1] == (255, 255, 255)


def test_wide_pictures_are_padded_not_stretched() -> None:
    wide = Image.new("RGBA", (8, 4), RED)
    dataset = make([Picture(wide, "a", f"{i}") for i in range(4)])
    pixels = np.array(dataset.info.palette)[dataset.train[0, 1:]].reshape(4, 4, 3)
    assert (pixels[[0, 3], :, 1] > 200).all()
    assert (pixels[[1, 2], :, 1] < 60).all()


def test_a_single_family_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold 1 of 1 families out"):
        make(families(1, 4))


def test_folders_are_labels(tmp_path: Path) -> None:
    for label, name in (("cats", "b.png"), ("cats", "a.PNG"), ("dogs", "a.bmp")):
        (tmp_path / label).mkdir(exist_ok=True)
        halves(RED, BLUE).convert("RGB").save(tmp_path / label / name)
    (tmp_path / "dogs" / "notes.txt").write_text("no picture")
    pictures = folder_pictures(tmp_path)
    assert [picture.label for picture in pictures] == ["cats", "cats", "dogs"]
    assert len({picture.family for picture in pictures}) == 3
    assert pictures[0].image.getpixel((0, 0)) == RED


def test_a_folder_without_pictures_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} has no images"):
        folder_pictures(tmp_path)


def test_a_missing_font_names_its_package(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="install Debian's fonts-noto-color-emoji"):
        emoji_pictures(font=tmp_path / "none.ttf")


@needs_emoji
def test_emoji_are_found_labelled_and_grouped() -> None:
    pictures = emoji_pictures()
    assert len(pictures) > 3000
    labels = {picture.label for picture in pictures}
    assert {"Flags", "People & Body", "Food & Drink", "Animals & Nature"} <= labels
    assert "Component" not in labels
    by_family: dict[str, list[Picture]] = {}
    for picture in pictures:
        by_family.setdefault(picture.family, []).append(picture)
    assert len(by_family[emoji_family([ord("👍")])]) == 6  # yellow and five skin tones
    assert len(by_family[emoji_family([*map(ord, "🇩🇪")])]) == 1
    assert len(by_family["people"]) > 50
    assert 1000 < len(by_family) < len(pictures)


@needs_emoji
def test_emoji_dataset() -> None:
    pictures = emoji_pictures()
    kept = {emoji_family([*map(ord, text)]) for text in ("👍", "🇩🇪", "🍎", "🐈", "⭐", "☎")}
    dataset = make([p for p in pictures if p.family in kept], colours=32)
    assert dataset.info.labels[:2] == ("Animals & Nature", "Flags")
    assert dataset.train.min() >= 0
    assert 16 < dataset.train[:, 1:].max() < 32
    assert len(dataset.heldout) == 1
