"""Pictures to palette indices: split by family, mirrored where that is still of its kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model.data import DataError, Dataset
from model.images import (
    EMOJI_FONT,
    EMOJI_TEST,
    Picture,
    emoji_family,
    emoji_pictures,
    fit_palette,
    fitted,
    folder_pictures,
    image_dataset,
)

RED, BLUE, CLEAR = (255, 0, 0, 255), (0, 0, 255, 255), (0, 0, 0, 0)

needs_emoji = pytest.mark.skipif(
    not (EMOJI_FONT.exists() and EMOJI_TEST.exists()),
    reason="needs Debian's fonts-noto-color-emoji and unicode-data",
)


SIZE = (4, 4)


def halves(left: tuple[int, ...], right: tuple[int, ...]) -> Image.Image:
    image = Image.new("RGBA", (8, 8), left)
    image.paste(right, (4, 0, 8, 8))
    return image


def picture(image: Image.Image, label: str, family: str) -> Picture:
    return Picture(fitted(image, SIZE), label, family)


def make(
    pictures: list[Picture], colours: int = 8, heldout: float = 0.2, mirror: bool = True
) -> Dataset:
    dataset, _ = image_dataset(
        pictures,
        source="test",
        license="CC0-1.0",
        colours=colours,
        heldout=heldout,
        mirror=mirror,
    )
    return dataset


def families(count: int, variants: int, label: str = "shape") -> list[Picture]:
    """Family f is red as far as column f, in `variants` identical pictures."""
    made = []
    for family in range(count):
        image = Image.new("RGBA", (8, 8), "white")
        image.paste(RED, (0, 0, 8, 1 + family))
        made += [picture(image, label, f"family {family}")] * variants
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
    pictures = [picture(halves(RED, BLUE), label, f"{i}") for i in range(2)]
    pictures += [picture(halves(RED, BLUE), "Flags", f"flag {i}") for i in range(20)]
    dataset = make(pictures, heldout=0.01)
    wanted = dataset.info.labels.index(label)
    rows = [row[1:].reshape(4, 4) for row in dataset.train if row[0] == wanted]
    assert any(np.array_equal(rows[0][:, ::-1], row) for row in rows) == mirrored
    plain = make(pictures, heldout=0.01, mirror=False)
    assert len(plain.train) == len(dataset.train) - (2 if mirrored else 0)
    assert not any(np.array_equal(rows[0][:, ::-1], row[1:].reshape(4, 4)) for row in plain.train)


def test_mirror_images_are_counted() -> None:
    options = {"source": "test", "license": "CC0-1.0", "heldout": 0.2}
    pictures = families(5, variants=6) + families(5, 1, "Flags")
    assert (
        image_dataset(pictures, **options)[1]
        == sum(row[0] == 1 for row in make(pictures).train) / 2
    )
    assert image_dataset(pictures, mirror=False, **options)[1] == 0


def test_indices_name_the_colours_of_the_picture() -> None:
    dataset = make([picture(halves(RED, CLEAR), "a", f"{i}") for i in range(4)])
    palette = np.array(dataset.info.palette)
    assert dataset.info.vocabulary == len(palette) <= 8
    assert (dataset.info.image_width, dataset.info.image_height) == SIZE
    pixels = palette[dataset.train[0, 1:]].reshape(4, 4, 3)
    assert np.abs(pixels[:, 0] - RED[:3]).max() < 40
    assert np.abs(pixels[:, 3] - 255).max() < 40  # what is transparent shows the white behind it


def test_the_indices_are_those_that_the_server_finds() -> None:
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (20, 4, 4, 3)).astype(np.uint8)
    pictures = [Picture(Image.fromarray(a), "a", f"{i}") for i, a in enumerate(noise)]
    dataset = make(pictures, colours=32, mirror=False)
    palette = np.array(dataset.info.palette)
    images = {a.tobytes(): a.reshape(-1, 3).astype(int) for a in noise}
    for row in [*dataset.train, *dataset.heldout]:
        near = [((a[:, None] - palette) ** 2).sum(axis=2).argmin(axis=1) for a in images.values()]
        assert any(np.array_equal(row[1:], indices) for indices in near)


@given(
    st.lists(st.tuples(*3 * [st.integers(0, 255)]), min_size=1, max_size=40),
    st.integers(2, 16),
)
def test_few_colours_stay_as_they_are_and_many_become_few(
    pixels: list[tuple[int, int, int]], colours: int
) -> None:
    palette = [tuple(c) for c in fit_palette(np.array(pixels, np.uint8), colours).tolist()]
    brightness = [299 * red + 587 * green + 114 * blue for red, green, blue in palette]
    assert brightness == sorted(brightness)
    assert len(set(palette)) == len(palette) <= colours
    assert ((255, 255, 255) in palette) >= ((255, 255, 255) in pixels)
    if len(set(pixels)) <= colours:
        assert set(palette) == set(pixels)


def test_white_is_the_last_colour_and_few_colours_are_not_padded() -> None:
    for colours in (2, 16, 256):
        info = make(families(5, 1), colours=colours).info
        seen = {pixel for one in families(5, 1) for pixel in one.image.get_flattened_data()}
        assert len(info.palette) <= min(colours, len(seen))
        assert info.palette[-1] == (255, 255, 255)


def test_images_of_twelve_colours_are_exact() -> None:
    rng = np.random.default_rng(2)
    twelve = rng.choice(256**3, 12, replace=False)
    twelve = np.stack((twelve >> 16, twelve >> 8 & 255, twelve & 255), axis=1).astype(np.uint8)
    drawn = twelve[np.concatenate([rng.permutation(12)[:12] for _ in range(20 * 4)])]
    drawn = drawn.reshape(-1)[: 20 * 48].reshape(20, 4, 4, 3)
    pictures = [Picture(Image.fromarray(a), "a", f"{i}") for i, a in enumerate(drawn)]
    dataset = make(pictures, colours=256)
    assert {tuple(colour) for colour in twelve.tolist()} == set(dataset.info.palette)
    palette = np.array(dataset.info.palette, np.uint8)
    assert dataset.info.vocabulary == 12
    back = {palette[row[1:]].tobytes() for row in [*dataset.train, *dataset.heldout]}
    assert back >= {a.tobytes() for a in drawn}


def test_one_colour_teaches_nothing() -> None:
    with pytest.raises(DataError, match="same single colour"):
        make([picture(Image.new("RGBA", (8, 8), RED), "a", f"{i}") for i in range(4)])


def test_wide_pictures_are_padded_not_stretched() -> None:
    wide = Image.new("RGBA", (8, 4), RED)
    dataset = make([picture(wide, "a", f"{i}") for i in range(4)])
    pixels = np.array(dataset.info.palette)[dataset.train[0, 1:]].reshape(4, 4, 3)
    assert (pixels[[0, 3], :, 1] > 200).all()
    assert (pixels[[1, 2], :, 1] < 60).all()


def test_pictures_are_padded_to_another_shape() -> None:
    small = np.asarray(fitted(Image.new("RGBA", (8, 8), RED), (8, 4)))
    assert (small[:, [0, 7]] == 255).all()
    assert (small[:, [3, 4]] == RED[:3]).all()
    assert np.array_equal(
        np.asarray(fitted(halves(RED, BLUE), (8, 8))), halves(RED, BLUE).convert("RGB")
    )


def test_a_strip_is_not_padded_without_end() -> None:
    strip = Image.new("RGBA", (1, 1_000_000), RED)
    column = np.asarray(fitted(strip, SIZE))
    assert (column[:, [0, 3]] == 255).all()
    with pytest.raises(ValueError, match=r"is 1x1000000 pixels, too long and narrow for 4096x4096"):
        fitted(strip, (4096, 4096))


def test_a_large_photograph_is_shrunk_as_evenly_as_a_small_one() -> None:
    rng = np.random.default_rng(4)
    small = rng.integers(0, 256, (16, 24, 4)).astype(np.uint8)
    small[:, :, 3] = 255
    large = Image.fromarray(small).resize((2400, 1600), Image.Resampling.NEAREST)
    one, other = (
        np.asarray(fitted(image, (12, 12)), np.int64)
        for image in (Image.fromarray(small).resize((240, 160), Image.Resampling.NEAREST), large)
    )
    assert np.abs(one - other).max() < 8


def test_a_single_family_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold 1 of 1 families out"):
        make(families(1, 4))


def test_folders_are_labels(tmp_path: Path) -> None:
    for label, name in (("cats", "b.png"), ("cats", "a.PNG"), ("dogs", "a.bmp")):
        (tmp_path / label).mkdir(exist_ok=True)
        halves(RED, BLUE).convert("RGB").save(tmp_path / label / name)
    (tmp_path / "dogs" / "notes.txt").write_text("no picture")
    pictures = folder_pictures(tmp_path, (8, 8))
    assert [picture.label for picture in pictures] == ["cats", "cats", "dogs"]
    assert len({picture.family for picture in pictures}) == 3
    assert pictures[0].image.getpixel((0, 0)) == RED[:3]


def test_photographs_in_a_folder_are_upright_and_16_bits_are_grey(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    halves(RED, BLUE).convert("RGB").save(tmp_path / "a.png", exif=exif)
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(tmp_path / "b.tif")
    turned, grey = (picture.image for picture in folder_pictures(tmp_path, (8, 8)))
    assert (turned.getpixel((0, 0)), turned.getpixel((7, 0))) == (BLUE[:3], RED[:3])
    assert set(grey.get_flattened_data()) == {(128, 128, 128)}


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(DataError, match=r"x.png is not a readable image .*; mend it, or take it"):
        folder_pictures(tmp_path, SIZE)


def test_a_folder_without_pictures_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} has no images"):
        folder_pictures(tmp_path, SIZE)


def test_a_missing_font_names_its_package(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="install Debian's fonts-noto-color-emoji"):
        emoji_pictures(SIZE, font=tmp_path / "none.ttf")


@needs_emoji
def test_emoji_are_found_labelled_and_grouped() -> None:
    pictures = emoji_pictures(SIZE)
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
    pictures = emoji_pictures(SIZE)
    kept = {emoji_family([*map(ord, text)]) for text in ("👍", "🇩🇪", "🍎", "🐈", "⭐", "☎")}
    dataset = make([p for p in pictures if p.family in kept], colours=32)
    assert dataset.info.labels[:2] == ("Animals & Nature", "Flags")
    assert dataset.train.min() >= 0
    assert 16 < dataset.train[:, 1:].max() < 32
    assert len(dataset.heldout) == 1
