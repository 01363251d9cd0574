"""Chooses the codec of a bundle by its manifest."""

from __future__ import annotations

from concertina.codecs.byte_codec import MOST_BYTES, ByteCodec
from concertina.codecs.codec import Codec
from concertina.codecs.palette_codec import PaletteCodec
from concertina.codecs.starts import LabelStarts
from concertina.v1 import bundle_pb2 as pb


class CodecError(Exception):
    """A manifest that contradicts itself in what its tokens are. The message is a noun phrase."""


def codec_of(manifest: pb.Manifest) -> Codec:
    """The codec of a bundle. Raises CodecError."""
    starts = LabelStarts(manifest.name, manifest.vocabulary, tuple(manifest.labels))
    if manifest.modality == pb.MODALITY_IMAGE:
        form = manifest.image
        pixels = form.width * form.height
        if pixels != manifest.context or len(form.palette) != 3 * manifest.vocabulary:
            raise CodecError(
                f"{form.width}x{form.height} pixels with a palette of {len(form.palette)} bytes"
            )
        return PaletteCodec(starts, form.width, form.height, form.palette)
    if manifest.vocabulary > MOST_BYTES:
        raise CodecError(f"a vocabulary of {manifest.vocabulary} for tokens that are bytes")
    return ByteCodec(starts)
