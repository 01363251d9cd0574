"""Windows of text as the model's own tokens."""

from __future__ import annotations

import numpy as np
import pytest

from model.run import RunError
from model.uptraining.texts import windows

TEXT = np.frombuffer(b"".join(b"%04d" % n for n in range(1000)), np.uint8)


def by_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int64)


def test_windows_are_pieces_of_the_text() -> None:
    made = windows(TEXT, by_bytes, None, count=5, length=64, seed=3)
    assert made.shape == (5, 64)
    for row in made.tolist():
        assert bytes(row) in TEXT.tobytes()
    again = windows(TEXT, by_bytes, None, count=5, length=64, seed=3)
    assert made.equal(again)
    assert not made.equal(windows(TEXT, by_bytes, None, count=5, length=64, seed=4))


def test_a_window_begins_with_the_token_that_every_text_begins_with() -> None:
    plain = windows(TEXT, by_bytes, None, count=3, length=64)
    begun = windows(TEXT, by_bytes, 256, count=3, length=64)
    assert begun[:, 0].tolist() == [256] * 3
    assert begun[:, 1:].equal(plain[:, :-1])


def test_as_much_is_read_as_the_tokens_need() -> None:
    """Here a token has four bytes at least; near the end of the text, the window moves forward."""
    made = windows(TEXT, lambda text: by_bytes(text)[::9], None, count=4, length=300)
    assert made.shape == (4, 300)


def test_evenly_spread_windows_reach_both_ends() -> None:
    made = windows(TEXT, by_bytes, None, count=4, length=64)
    assert bytes(made[0].tolist()) == TEXT.tobytes()[:64]
    starts = [TEXT.tobytes().index(bytes(row)) for row in made.tolist()]
    assert starts == sorted(set(starts)) and starts[-1] > 3000


def test_documents_are_apart() -> None:
    text = np.frombuffer(b"abc\0" * 100, np.uint8)
    made = windows(text, by_bytes, None, count=1, length=8)
    assert bytes(made[0].tolist()) == b"abc\nabc\n"


def test_too_little_text_is_refused() -> None:
    with pytest.raises(RunError, match="100 bytes, too few for windows of 64 tokens"):
        windows(TEXT[:100], by_bytes, None, count=1, length=64)
    with pytest.raises(RunError, match="fewer than 300 tokens"):
        windows(TEXT[:1000], lambda text: by_bytes(text)[::9], None, count=1, length=300)
