from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from concertina.codecs.choosing import CodecError, codec_of
from concertina.codecs.prompt_error import PromptError
from concertina.v1 import bundle_pb2 as pb

NOWHERE = Path("nowhere")
PALETTE = bytes([0, 0, 0, 255, 255, 255, 255, 0, 0])


def _text(**fields: object) -> pb.Manifest:
    made = pb.Manifest(name="prose", modality=pb.MODALITY_TEXT, vocabulary=256, context=8)
    made.MergeFrom(pb.Manifest(**fields))  # type: ignore[arg-type]
    return made


def _image(**fields: object) -> pb.Manifest:
    form = pb.ImageFormat(width=2, height=3, palette=PALETTE)
    made = pb.Manifest(
        name="flags", modality=pb.MODALITY_IMAGE, vocabulary=3, context=6, image=form
    )
    made.MergeFrom(pb.Manifest(**fields))  # type: ignore[arg-type]
    return made


def test_the_tokens_of_a_text_model_are_bytes() -> None:
    codec = codec_of(_text(), NOWHERE)
    assert (codec.size, codec.takes, codec.makes, codec.complete_at) == (
        256,
        {"text"},
        "text",
        None,
    )
    assert codec.from_text("é").tolist() == [0xC3, 0xA9]
    assert codec.text.decode(codec.from_text("é€")) == "é€"
    assert codec.rgb([1, 2]) == b""
    for wrong in (codec.from_png, codec.from_rgb):
        with pytest.raises(PromptError, match="prose makes text: give text") as refused:
            wrong(b"")
        assert refused.value.field == "image"


def test_the_tokens_of_an_image_model_are_pixels() -> None:
    codec = codec_of(_image(), NOWHERE)
    assert (codec.size, codec.takes, codec.makes, codec.complete_at) == (3, {"image"}, "images", 6)
    pixels = np.array([[[250, 0, 0], [9, 9, 9]]], np.uint8)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, format="PNG")
    assert codec.from_rgb(pixels.tobytes()).tolist() == [2, 0]
    assert codec.from_png(png.getvalue()).tolist() == [2, 0]
    assert codec.rgb([2, 0, 1]) == bytes([255, 0, 0, 0, 0, 0, 255, 255, 255])
    assert codec.text.decode([0, 1, 2]) == ""
    with pytest.raises(PromptError, match="flags makes images: give an image"):
        codec.from_text("red")


def test_labels_have_start_tokens_of_their_own() -> None:
    starts = codec_of(_text(labels=["news", "mail"]), NOWHERE).starts
    ids = np.array([65])
    assert [starts.split(ids, label)[0] for label in (None, "news", "mail")] == [256, 257, 258]
    assert [starts.label_of(start) for start in (256, 257, 258)] == [None, "news", "mail"]
    assert [start for start in range(255, 261) if starts.allows(start)] == [256, 257, 258]
    assert starts.joined(*starts.split(ids, "mail")).tolist() == [65]
    with pytest.raises(PromptError, match="is 'spam'; prose has these labels: 'news', 'mail'"):
        starts.split(ids, "spam")


@pytest.mark.parametrize(
    ("manifest", "flaw"),
    [
        (_text(vocabulary=257), "a vocabulary of 257 for tokens that are bytes"),
        (_image(context=7), "2x3 pixels with a palette of 9 bytes"),
        (_image(vocabulary=4), "2x3 pixels with a palette of 9 bytes"),
    ],
)
def test_a_manifest_that_contradicts_itself_has_no_codec(manifest: pb.Manifest, flaw: str) -> None:
    with pytest.raises(CodecError, match=flaw):
        codec_of(manifest, NOWHERE)
