"""Image datasets: images reduced to one palette index per pixel."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from model.data import Dataset, DatasetInfo

EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")

_SKIN_TONES = range(0x1F3FB, 0x1F400)
_VARIATION, _JOINER = 0xFE0F, 0x200D
_GENDER_SIGNS = (0x2640, 0x2642)
_MAN, _WOMAN, _PERSON = 0x1F468, 0x1F469, 0x1F9D1
_VARIANTS_KEPT = 4
_NOT_MIRRORED = ("Symbols", "Flags")


@dataclass(frozen=True)
class Picture:
    """One image in full colour. `family` is the same for images that are nearly the same."""

    image: Image.Image
    label: str
    family: str


def image_dataset(
    pictures: Sequence[Picture],
    size: tuple[int, int],
    *,
    source: str,
    license: str,
    colours: int = 256,
    heldout: float = 0.05,
    seed: int = 0,
) -> Dataset:
    """Palette indices of `pictures` at `size` (width, height), split by family.

    Each family is either trained on, with at most four images, or held out, with one image. The
    training part also has mirrored copies, except for labels whose images a mirror would change.
    Raises ValueError if no family is left to train on.
    """
    rng = np.random.default_rng(seed)
    families: dict[str, list[Picture]] = {}
    for picture in pictures:
        families.setdefault(picture.family, []).append(picture)
    names = sorted(families)
    rng.shuffle(names)
    kept = max(1, round(len(names) * heldout))
    if len(names) <= kept:
        raise ValueError(f"cannot hold {kept} of {len(names)} families out: add more images")
    held = [families[name][0] for name in names[:kept]]
    train: list[Picture] = []
    for name in names[kept:]:
        variants = families[name]
        chosen = rng.permutation(len(variants))[:_VARIANTS_KEPT]
        train += [variants[index] for index in sorted(chosen)]

    labels = tuple(sorted({picture.label for picture in pictures}))
    small = [_shrink(picture.image, size) for picture in train]
    palette = _palette(small, colours)

    def rows(pictures: Sequence[Picture], images: Sequence[Image.Image]) -> npt.NDArray[np.int16]:
        indices = [np.asarray(_indexed(image, palette)).ravel() for image in images]
        label = [labels.index(picture.label) for picture in pictures]
        return np.column_stack((label, indices)).astype(np.int16)

    mirrored = [
        (picture, ImageOps.mirror(image))
        for picture, image in zip(train, small, strict=True)
        if picture.label not in _NOT_MIRRORED
    ]
    train += [picture for picture, _ in mirrored]
    small += [image for _, image in mirrored]
    info = DatasetInfo(
        "image",
        vocabulary=colours,
        source=source,
        license=license,
        image_width=size[0],
        image_height=size[1],
        palette=_colours(palette, colours),
        labels=labels,
    )
    heldout_rows = rows(held, [_shrink(picture.image, size) for picture in held])
    return Dataset(info, rows(train, small), heldout_rows)


def folder_pictures(folder: Path) -> list[Picture]:
    """Every image below `folder`; the label is the name of the image's own folder."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}:
            with Image.open(path) as image:
                found.append(Picture(image.convert("RGBA"), path.parent.name, str(path)))
    if not found:
        raise ValueError(f"{folder} has no images (png, jpg, webp, bmp, gif)")
    return found


def emoji_pictures(font: Path = EMOJI_FONT, emoji_test: Path = EMOJI_TEST) -> list[Picture]:
    """Bitmaps of Noto Color Emoji, labelled with their Unicode group.

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
            image = Image.open(io.BytesIO(bitmaps[name])).convert("RGBA")
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


def _shrink(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    padded = ImageOps.pad(image, (max(image.size),) * 2, color=(255, 255, 255, 0))
    white = Image.new("RGBA", padded.size, "white")
    white.alpha_composite(padded)
    return white.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _palette(images: Sequence[Image.Image], colours: int) -> Image.Image:
    """A palette, as an image, fitted to the pixels of all `images` and ordered by brightness."""
    pixels = np.concatenate([np.asarray(image).reshape(-1, 3) for image in images])
    binned = np.unique(pixels // 8, axis=0) * 8 + 4  # rare colours get the weight of common ones
    rng = np.random.default_rng(0)
    mixed = np.concatenate((binned, pixels[rng.integers(len(pixels), size=200_000)]))
    mosaic = Image.fromarray(mixed[None].astype(np.uint8))
    fitted = mosaic.quantize(colours, method=Image.Quantize.MEDIANCUT, kmeans=1)
    flat = np.asarray((fitted.getpalette() or [])[: 3 * colours]).reshape(-1, 3)
    flat = flat[np.argsort(flat @ (299, 587, 114))]
    flat = np.pad(flat, ((0, colours - len(flat)), (0, 0)), constant_values=255)
    flat[-1] = 255  # exactly the white background
    ordered = Image.new("P", (1, 1))
    ordered.putpalette(flat.ravel().tolist())
    return ordered


def _colours(palette: Image.Image, colours: int) -> tuple[tuple[int, int, int], ...]:
    flat = palette.getpalette() or []
    return tuple((flat[3 * i], flat[3 * i + 1], flat[3 * i + 2]) for i in range(colours))


def _indexed(image: Image.Image, palette: Image.Image) -> Image.Image:
    return image.quantize(palette=palette, dither=Image.Dither.NONE)
