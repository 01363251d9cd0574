"""Pictures as prompts: whatever they are given as, a server sees the same pixels."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from concertina.client import InvalidRequest
from concertina.client.requests import prompt_message

MODES = {(): "L", (1,): "L", (2,): "LA", (3,): "RGB", (4,): "RGBA"}


def sent(prompt: Any) -> Image.Image:
    message = prompt_message(prompt, None)
    assert message is not None
    return Image.open(io.BytesIO(message.image.png))


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.sampled_from(sorted(MODES)),
    seed=st.integers(0, 99),
)
def test_an_array_is_the_picture_that_pillow_makes_of_it(
    height: int, width: int, channels: tuple[int, ...], seed: int
) -> None:
    shape = (height, width, *channels)
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    image = sent(array)
    assert (image.mode, image.size) == (MODES[channels], (width, height))
    assert np.array_equal(np.asarray(image).reshape(shape), array)
    assert image.tobytes() == sent(image).tobytes()


def test_rows_need_not_lie_side_by_side() -> None:
    array = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    for view in (array[::-1, ::2], np.asfortranarray(array), array.transpose(1, 0, 2)):
        assert np.array_equal(np.asarray(sent(view)), view)


def test_an_array_of_one_axis_is_token_ids() -> None:
    for kind in (np.uint8, np.int32, np.int64):
        message = prompt_message(np.array([3, 1, 2], kind), None)  # type: ignore[arg-type]
        assert message is not None
        assert list(message.tokens.ids) == [3, 1, 2]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 2, 3)),
        np.zeros((2, 2, 3), np.uint16),
        np.zeros((2, 2), bool),
        np.zeros((2, 2, 5), np.uint8),
        np.zeros((1, 2, 2, 3), np.uint8),
        np.zeros((0, 2, 3), np.uint8),
        np.zeros((2, 2, 0), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_an_array_that_is_no_picture_is_named(array: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt is a") as raised:
        prompt_message(array, None)
    assert raised.value.field == "prompt"
