"""Turns a prompt (text, token ids, or the first rows of an image) into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from concertina.codecs.image_files import ImageError, ImageTooLarge, open_image
from concertina.codecs.pixels import Colours, nearest, on_white, shown_rows
from concertina.shown import listed, shown
from concertina.v1 import generation_service_pb2 as pb
from server.arrays import Ints
from server.bundles.bundle import Bundle
from server.errors import InvalidRequest
from server.request import Prompt, prompt_of

_AT_ONCE: Final = 16 * 1024


def prompt_tokens(bundle: Bundle, prompt: pb.Prompt, *, room: int) -> Prompt:
    """The tokens of a prompt, and the start token of its label.

    room: number of tokens that must be left to generate. Raises InvalidRequest with field, value
    and limit.
    """
    content = prompt.WhichOneof("content")
    ids: npt.NDArray[np.int64]
    if content == "text":
        ids = _from_text(bundle, prompt.text, room)
    elif content == "tokens":
        ids = _from_ids(bundle, prompt.tokens.ids, room)
    elif content == "image":
        ids = _from_image(bundle, prompt.image)
    elif prompt.HasField("label"):
        ids = np.zeros(0, np.int64)
    else:
        raise InvalidRequest(
            "prompt is empty: give a label, text, tokens or an image, or leave prompt out "
            "to start from nothing",
            field="prompt",
        )
    _require_room(bundle, len(ids), room)
    return prompt_of(_start_token(bundle, prompt), ids, bundle.typecode)


def _require_room(bundle: Bundle, tokens: int, room: int) -> None:
    limit = bundle.context - room
    if tokens > limit:
        kept = f" and {room} of them must be left to generate" if room else ""
        raise InvalidRequest(
            f"prompt has {tokens} tokens, the limit is {limit}: "
            f"{bundle.name} has a context of {bundle.context} tokens{kept}",
            field="prompt",
            limit=limit,
        )


def _start_token(bundle: Bundle, prompt: pb.Prompt) -> int:
    start: int = bundle.vocabulary
    if not prompt.HasField("label"):
        return start
    labels = list(bundle.manifest.labels)
    if prompt.label not in labels:
        names = listed(map(repr, labels)) or "none"
        raise InvalidRequest(
            f"prompt.label is {shown(prompt.label)}; {bundle.name} has these labels: {names}",
            field="prompt.label",
        )
    return start + 1 + labels.index(prompt.label)


def _from_text(bundle: Bundle, text: str, room: int) -> Ints:
    if bundle.is_image:
        raise InvalidRequest(
            f"prompt.text was given, but {bundle.name} makes images: give an image",
            field="prompt.text",
        )
    if not text:
        raise InvalidRequest(
            "prompt.text is empty: it must hold at least 1 character; "
            "leave prompt out to start from nothing",
            field="prompt.text",
        )
    encoded = text.encode()
    _require_room(bundle, len(encoded), room)  # before anything is computed from them
    return np.frombuffer(encoded, np.uint8).astype(np.int64)


def _from_ids(bundle: Bundle, ids: Sequence[int], room: int) -> Ints:
    if not ids:
        raise InvalidRequest(
            "prompt.tokens.ids is empty: it must hold at least 1 id; "
            "leave prompt out to start from nothing",
            field="prompt.tokens.ids",
        )
    _require_room(bundle, len(ids), room)
    tokens = np.empty(len(ids), np.int64)
    for at in range(0, len(ids), _AT_ONCE):  # other threads have their turn in between
        tokens[at : at + _AT_ONCE] = ids[at : at + _AT_ONCE]
    vocabulary = bundle.vocabulary
    wrong = np.flatnonzero(tokens >= vocabulary)
    if len(wrong):
        raise InvalidRequest(
            f"prompt.tokens.ids[{wrong[0]}] is {tokens[wrong[0]]}; "
            f"ids of {bundle.name} must be below {vocabulary}",
            field=f"prompt.tokens.ids[{wrong[0]}]",
            limit=vocabulary - 1,
        )
    return tokens


def _from_image(bundle: Bundle, image: pb.ImageRows) -> Ints:
    if not bundle.is_image:
        raise InvalidRequest(
            f"prompt.image was given, but {bundle.name} makes text: give text", field="prompt.image"
        )
    form = image.WhichOneof("rows")
    if form is None:
        raise InvalidRequest("prompt.image is empty: give png or rgb", field="prompt.image")
    pixels = _from_png(bundle, image.png) if form == "png" else _from_rgb(bundle, image.rgb)
    return nearest(pixels, bundle.manifest.image.palette)


def _from_png(bundle: Bundle, png: bytes) -> Colours:
    """Pixels `[n, 3]` on white, without the fully transparent rows at the bottom."""
    field, form = "prompt.image.png", bundle.manifest.image
    try:
        rgba = open_image(png, ("PNG",), most_pixels=form.width * form.height)
        size = rgba.size
    except ImageTooLarge as error:
        size = error.size
    except ImageError as error:
        raise InvalidRequest(f"{field} has {len(png)} bytes and {error}", field=field) from None
    if size[0] != form.width or size[1] > form.height:
        raise InvalidRequest(
            f"{field} is {size[0]}x{size[1]} pixels; {bundle.name} takes images {form.width} wide "
            f"and at most {form.height} high",
            field=field,
        )
    rows = shown_rows(rgba)
    if rows is None:
        raise InvalidRequest(
            f"{field} is wholly transparent: at least 1 row must show", field=field
        )
    return on_white(rows)


def _from_rgb(bundle: Bundle, rgb: bytes) -> Colours:
    form = bundle.manifest.image
    row = 3 * form.width
    if not rgb or len(rgb) % row or len(rgb) > row * form.height:
        raise InvalidRequest(
            f"prompt.image.rgb has {len(rgb)} bytes; {bundle.name} takes 1 to {form.height} rows "
            f"of {row} bytes",
            field="prompt.image.rgb",
        )
    return np.frombuffer(rgb, np.uint8).reshape(-1, 3)
