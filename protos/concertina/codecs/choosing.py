"""Chooses the codec of a bundle by its manifest."""

from __future__ import annotations

from pathlib import Path

from concertina.codecs.byte_codec import MOST_BYTES, ByteCodec
from concertina.codecs.codec import Codec
from concertina.codecs.palette_codec import PaletteCodec
from concertina.codecs.starts import LabelStarts, TokenStarts
from concertina.codecs.tokenizer_codec import tokenizer_codec
from concertina.codecs.tokenizer_file import TOKENIZER, TokenizerError, require_size
from concertina.v1 import bundle_pb2 as pb


class CodecError(Exception):
    """A manifest that contradicts itself in what its tokens are. The message is a noun phrase."""


def codec_of(manifest: pb.Manifest, folder: Path) -> Codec:
    """The codec of the bundle in `folder`. Raises CodecError, and TokenizerError for its file."""
    starts = LabelStarts(manifest.name, manifest.vocabulary, tuple(manifest.labels))
    if manifest.modality == pb.MODALITY_IMAGE:
        form = manifest.image
        pixels = form.width * form.height
        if pixels != manifest.context or len(form.palette) != 3 * manifest.vocabulary:
            raise CodecError(
                f"{form.width}x{form.height} pixels with a palette of {len(form.palette)} bytes"
            )
        return PaletteCodec(starts, form.width, form.height, form.palette)
    if manifest.HasField("tokenizer"):
        return _with_tokenizer(manifest, folder)
    if manifest.vocabulary > MOST_BYTES:
        raise CodecError(f"a vocabulary of {manifest.vocabulary} for tokens that are bytes")
    return ByteCodec(starts)


def _with_tokenizer(manifest: pb.Manifest, folder: Path) -> Codec:
    if TOKENIZER not in {file.path for file in manifest.files}:
        raise CodecError(f"a tokenizer without {TOKENIZER}")
    if manifest.labels:
        raise CodecError("a tokenizer with labels")
    begin = manifest.tokenizer.begin_token if manifest.tokenizer.HasField("begin_token") else None
    if begin is not None and begin >= manifest.vocabulary:
        raise CodecError(f"begin token {begin} of {manifest.vocabulary}")
    path = folder / TOKENIZER
    try:
        require_size(path.stat().st_size)
        content = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot be read: {error.strerror}") from None
    starts = TokenStarts(manifest.name, manifest.vocabulary, begin)
    return tokenizer_codec(starts, content)
