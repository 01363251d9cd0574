"""Bugs in how images and text become tokens: files, colours, palettes, splits, the command line."""

from __future__ import annotations

from tests.mutants.mutant import bugs

_CODECS = "tests/concertina/codecs"
_COMMANDS = "tests/concertina/cli/test_commands.py"
_CLIENT = "tests/concertina/client/test_client.py"
_PROMPT = "tests/server/api/test_prompt.py"
_IMAGES = "tests/model/test_images.py"
_TEXT = "tests/model/test_text.py"
_DATA = "tests/model/test_data_command.py"

MUTANTS = (
    *bugs(
        "protos/concertina/codecs/image_files.py",
        _CODECS,
        ("grey of 16 bits is clipped", "values.astype(np.uint16) >> 8", "np.minimum(values, 255)"),
        ("floats are cut, not rounded", "np.rint(values * 255)", "np.trunc(values * 255)"),
        (
            "a white that is not known is guessed",
            "if not ((values >= 0) & (values <= white)).all():",
            "if False:",
        ),
        ("a transparent grey is compared unscaled", "* 255 // top)", ")"),
        ("a transparent colour of 16 bits is lost", "png_depth == 16", "png_depth == 8"),
        (
            "two orientations are mixed up",
            "6: Image.Transpose.ROTATE_270",
            "6: Image.Transpose.ROTATE_90",
        ),
        ("a turned image is turned again", "rgba.info.clear()", "pass"),
        ("broken EXIF breaks the image", "        return None", "        raise"),
        (
            "a large image is decoded",
            "if image.width * image.height > most_pixels:",
            "if image.width * image.height > most_pixels + 1:",
        ),
        ("every format of Pillow is read", "formats=formats)", "formats=None)"),
        (
            "a decoder's error gets out",
            "except Exception as error:  # Pillow's decoders",
            "except OSError as error:  # Pillow's decoders",
        ),
    ),
    *bugs(
        "protos/concertina/codecs/pixels.py",
        _CODECS,
        ("what lies on white is cut, not rounded", "(missing + 127)", "missing"),
        ("products overflow", "astype(np.uint16) * pixels", "astype(np.uint8) * pixels"),
        ("the nearest of equals is the last", ".argmin(axis=1)", "[:, ::-1].argmin(axis=1)"),
        ("distances lack the palette's lengths", "(lengths - distinct", "(0 * lengths - distinct"),
        ("red and blue change places", "[1 << 16, 1 << 8, 1]", "[1, 1 << 8, 1 << 16]"),
        ("a row that shows is cut off", "rgba.width, box[3])", "rgba.width, box[3] - 1)"),
    ),
    *bugs(
        "protos/concertina/cli/inputs.py",
        _COMMANDS,
        (
            "a height between cells is cut",
            "    if rest:\n        crop",
            "    if False:\n        crop",
            "test_an_image_that_cannot_be_completed_is_refused",
        ),
    ),
    *bugs(
        "protos/concertina/cli/score.py",
        _COMMANDS,
        (
            "the file decides what it is",
            'if "image" in kinds:',
            "if True:",
            "test_a_text_model_is_given_text",
        ),
        (
            "a broken image is text to a model of images",
            'if "text" not in kinds:',
            "if False:",
            "test_an_image_model_is_given_an_image",
        ),
    ),
    *bugs(
        "protos/concertina/cli/canvas.py",
        _COMMANDS,
        (
            "NO_COLOR is painted in blocks",
            "not (console.no_color or ",
            "not (",
            "test_paint_without_colours_prints_shades",
        ),
        (
            "a dumb terminal is painted in blocks",
            "console.is_dumb_terminal or ",
            "",
            "test_paint_without_colours_prints_shades",
        ),
    ),
    *bugs(
        "protos/concertina/cli/paint.py",
        _COMMANDS,
        (
            "a scale without a limit",
            "if scale > most:",
            "if False:",
            "test_the_largest_scale_depends_on_the_model",
        ),
    ),
    *bugs(
        "protos/concertina/client/pictures.py",
        _CLIENT,
        ("an image loses its orientation", "1 < orientation <= 8", "False"),
    ),
    *bugs(
        "protos/concertina/codecs/palette_codec.py",
        _PROMPT,
        ("a prompt is read in any format", '("PNG",), ', ""),
        (
            "a large prompt is decoded",
            "most_pixels=self.complete_at",
            "most_pixels=1 << 26",
        ),
    ),
    *bugs(
        "model/images.py",
        _IMAGES,
        (
            "training maps colours with Pillow",
            "nearest(_pixels(picture), palette.tobytes())",
            "np.asarray(picture.image.quantize(dither=0, palette=(p := Image.new('P', (1, 1)), "
            "p.putpalette(palette.tobytes()))[0])).ravel()",
        ),
        ("few colours are clustered", "if len(distinct) <= colours", "if False"),
        (
            "white is lost",
            "palette[nearest(distinct[-1:], palette.tobytes())] = 255",
            "pass",
            "test_white_is_the_last_colour_and_few_colours_are_not_padded",
        ),
        ("a palette is padded", "vocabulary=len(palette)", "vocabulary=colours"),
        ("mirror images unasked", "if mirror and picture", "if picture"),
        (
            "another shape stretches",
            "(round(shrinks * size[0]), round",
            "(rgb.width, round",
            "test_pictures_are_padded_to_another_shape",
        ),
    ),
    *bugs(
        "model/text.py",
        _TEXT,
        ("a character is torn", "& 0xC0 == 0x80", "& 0xC0 == 0"),
        ("the share is of files", "abs(ends[kept] - wanted) > wanted / 2", "not kept"),
    ),
    *bugs(
        "model/data.py",
        _DATA,
        (
            "a dataset replaces another",
            "if (held.modality, held.source) != (modality, source):",
            "if False:",
            "test_only_a_dataset_of_the_same_data_is_replaced",
        ),
        ("any folder is written into", "if not (folder / _INFO).is_file():", "if False:"),
    ),
    *bugs(
        "model/data_command.py",
        _DATA,
        ("mirror images are not said", "        if mirrored:", "        if False:"),
        ("--no-mirror is not heard", "mirror=not no_mirror", "mirror=True"),
        ("a share may be nothing", "if not 0 < value < 1:", "if value > 1:"),
    ),
)
