"""Image datasets: images reduced to one palette index per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from concertina.codecs.image_files import MOST_PIXELS, ImageError, open_image
from concertina.codecs.pixels import Colours, nearest, on_white
from model.data import DataError, Dataset, DatasetInfo

EMOJI_SOURCE, EMOJI_LICENSE = "Noto Color Emoji", "OFL-1.1"
EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")

_SKIN_TONES = range(0x1F3FB, 0x1F400)
_VARIATION, _JOINER = 0xFE0F, 0x200D
_GENDER_SIGNS = (0x2640, 0x2642)
_MAN, _WOMAN, _PERSON = 0x1F468, 0x1F469, 0x1F9D1
_VARIANTS_KEPT = 4
_NOT_MIRRORED = ("Symbols", "Flags")
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_FINE = 16
_BRIGHTNESS = (299, 587, 114)


@dataclass(frozen=True)
class Picture:
    """One image in full colour, on white and at its final size, as `fitted` returns it.

    family: the same for images that are nearly the same.
    """

    image: Image.Image
    label: str
    family: str


def image_dataset(
    pictures: Sequence[Picture],
    *,
    source: str,
    license: str,
    colours: int = 256,
    heldout: float = 0.05,
    seed: int = 0,
    mirror: bool = True,
) -> tuple[Dataset, int]:
    """Palette indices of `pictures`, split by family, and how many of them are mirror images.

    Each family is either trained on, with at most four images, or held out, with one image. With
    `mirror`, the training part also has mirror images, except for labels whose images a mirror
    would change. If the images to train on have no more than `colours`, the palette is just these.
    Raises DataError if no family is left to train on, or there is nothing to learn.
    """
    train, held = _split(pictures, heldout, seed)
    labels = tuple(sorted({picture.label for picture in pictures}))
    palette = fit_palette(np.concatenate([_pixels(picture) for picture in train]), colours)
    if len(palette) < 2:
        raise DataError("all images to train on have the same single colour: nothing to learn")
    mirrored = [
        replace(picture, image=ImageOps.mirror(picture.image))
        for picture in train
        if mirror and picture.label not in _NOT_MIRRORED
    ]

    def rows(pictures: Sequence[Picture]) -> npt.NDArray[np.int16]:
        indices = [nearest(_pixels(picture), palette.tobytes()) for picture in pictures]
        label = [labels.index(picture.label) for picture in pictures]
        return np.column_stack((label, indices)).astype(np.int16)

    width, height = pictures[0].image.size
    info = DatasetInfo(
        "image",
        vocabulary=len(palette),
        source=source,
        license=license,
        image_width=width,
        image_height=height,
        palette=tuple((red, green, blue) for red, green, blue in palette.tolist()),
        labels=labels,
    )
    return Dataset(info, rows([*train, *mirrored]), rows(held)), len(mirrored)


def _split(
    pictures: Sequence[Picture], heldout: float, seed: int
) -> tuple[list[Picture], list[Picture]]:
    rng = np.random.default_rng(seed)
    families: dict[str, list[Picture]] = {}
    for picture in pictures:
        families.setdefault(picture.family, []).append(picture)
    names = sorted(families)
    rng.shuffle(names)
    kept = max(1, round(len(names) * heldout))
    if len(names) <= kept:
        raise DataError(f"cannot hold {kept} of {len(names)} families out: add more images")
    held = [families[name][0] for name in names[:kept]]
    train: list[Picture] = []
    for name in names[kept:]:
        variants = families[name]
        chosen = rng.permutation(len(variants))[:_VARIANTS_KEPT]
        train += [variants[index] for index in sorted(chosen)]
    return train, held


def folder_pictures(folder: Path, size: tuple[int, int]) -> list[Picture]:
    """Every image below `folder`, at `size`; the label is the name of the image's own folder.

    Raises DataError if there is none, or one cannot be read.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _SUFFIXES and path.is_file():
            try:
                image = fitted(open_image(path.read_bytes()), size)
            except ImageError as error:
                raise DataError(f"{path} {error}; mend it, or take it away") from None
            found.append(Picture(image, path.parent.name, str(path)))
    if not found:
        raise DataError(f"{folder} has no images ({', '.join(sorted(_SUFFIXES))})")
    return found


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An RGBA image on white, padded to the shape of `size` and scaled to it: not stretched.

    Raises ImageError if it is so long and narrow that the padding would be too large.
    """
    rgb = Image.fromarray(on_white(image).reshape(image.height, image.width, 3))
    shrinks = max(image.width / size[0], image.height / size[1])
    if shrinks >= 2 * _FINE:  # means of squares first: as good, and the padding stays small
        rgb = rgb.reduce(int(shrinks / _FINE))
        shrinks = max(rgb.width / size[0], rgb.height / size[1])
    whole = (round(shrinks * size[0]), round(shrinks * size[1]))
    if whole[0] * whole[1] > MOST_PIXELS:
        raise ImageError(
            f"is {image.width}x{image.height} pixels, too long and narrow for {size[0]}x{size[1]}: "
            "cut it into parts"
        )
    padded = Image.new("RGB", whole, "white")
    padded.paste(rgb, (round((whole[0] - rgb.width) / 2), round((whole[1] - rgb.height) / 2)))
    return padded.resize(size, Image.Resampling.LANCZOS)


def fit_palette(pixels: Colours, colours: int) -> Colours:
    """At most `colours` different colours that stand for those of `pixels`, dark ones first.

    If `pixels` have no more colours than that, they are just these; if white is one of several
    more, it is among them.
    """
    distinct = _distinct(pixels)
    palette = distinct if len(distinct) <= colours else _clustered(pixels, distinct, colours)
    if (distinct[-1] == 255).all() and not (palette == 255).all(axis=1).any():
        palette[nearest(distinct[-1:], palette.tobytes())] = 255
    palette = _distinct(palette)
    return palette[np.argsort(palette @ np.array(_BRIGHTNESS), kind="stable")]


def _distinct(colours: Colours) -> Colours:
    """Each of `colours` once, in the order of red, green, blue."""
    seen = np.zeros(1 << 24, np.bool_)  # a sort of all pixels takes far longer
    seen[colours @ np.array([1 << 16, 1 << 8, 1])] = True
    packed = np.flatnonzero(seen)
    return np.stack((packed >> 16, packed >> 8 & 255, packed & 255), axis=1).astype(np.uint8)


def _clustered(pixels: Colours, distinct: Colours, colours: int) -> Colours:
    binned = _distinct(distinct // 8) * 8 + 4  # rare colours get the weight of common ones
    rng = np.random.default_rng(0)
    mixed = np.concatenate((binned, pixels[rng.integers(len(pixels), size=200_000)]))
    mosaic = Image.fromarray(mixed[None].astype(np.uint8))
    clusters = mosaic.quantize(colours, method=Image.Quantize.MEDIANCUT, kmeans=1)
    return np.array((clusters.getpalette() or [])[: 3 * colours], np.uint8).reshape(-1, 3)


def _pixels(picture: Picture) -> Colours:
    return np.asarray(picture.image).reshape(-1, 3)


def emoji_pictures(
    size: tuple[int, int], font: Path = EMOJI_FONT, emoji_test: Path = EMOJI_TEST
) -> list[Picture]:
    """Bitmaps of Noto Color Emoji at `size`, labelled with their Unicode group.

    Needs the files of Debian's packages fonts-noto-color-emoji and unicode-data.
    """
    from fontTools.ttLib import TTFont

    for path, package in ((font, "fonts-noto-color-emoji"), (emoji_test, "unicode-data")):
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: install Debian's {package}")
    groups = _emoji_groups(emoji_test)
    tables = TTFont(font)
    glyph_of = tables.getBestCmap()
    ligatures = {
        (first, *ligature.Component): ligature.LigGlyph
        for lookup in tables["GSUB"].table.LookupList.Lookup
        for subtable in lookup.SubTable
        for first, candidates in _ligature_sets(subtable)
        for ligature in candidates
    }
    bitmaps: dict[str, bytes] = {}
    for strike in tables["CBDT"].strikeData:
        bitmaps.update({name: glyph.imageData for name, glyph in strike.items()})

    pictures, seen = [], set()
    for sequence, group in groups.items():
        glyphs = tuple(glyph_of[c] for c in sequence if c != _VARIATION and c in glyph_of)
        name = glyphs[0] if len(glyphs) == 1 else ligatures.get(glyphs, "")
        if name in bitmaps and name not in seen:
            seen.add(name)
            image = fitted(open_image(bitmaps[name]), size)
            pictures.append(Picture(image, group, emoji_family(sequence)))
    return pictures


def emoji_family(sequence: Sequence[int]) -> str:
    """Base emoji of a code point sequence, without skin tone, gender and presentation."""
    plain = [
        _PERSON if c in (_MAN, _WOMAN) else c
        for c in sequence
        if c not in _SKIN_TONES and c not in (_VARIATION, _JOINER, *_GENDER_SIGNS)
    ]
    if plain.count(_PERSON) > 1:
        return "people"
    return "-".join(f"{c:x}" for c in plain)


def _ligature_sets(subtable: Any) -> list[tuple[str, list[Any]]]:
    inner = getattr(subtable, "ExtSubTable", subtable)
    return list(getattr(inner, "ligatures", {}).items())


def _emoji_groups(emoji_test: Path) -> dict[tuple[int, ...], str]:
    groups: dict[tuple[int, ...], str] = {}
    group = ""
    for line in emoji_test.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line and not line.startswith("#") and group != "Component":
            sequence = tuple(int(code, 16) for code in line.partition(";")[0].split())
            groups[sequence] = group
    return groups
