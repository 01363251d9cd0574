"""The prefix cache against a plain list of its blocks, and its limit in bytes."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import numpy as np
import pytest

from server.arrays import Ints, State
from server.engine.prefix_cache import PrefixCache, added, joined

SPAN = 3


def tokens(text: str) -> Ints:
    return np.array([ord(letter) for letter in text], np.int64)


def left(text: str) -> State:
    """The entry of a block: here, a sum over all tokens up to its end."""
    return {"keys": np.full((2, 1, 5), sum(map(ord, text)), np.float32)}


def keep(cache: PrefixCache, text: str) -> None:
    """Insert the blocks of `text` that are not cached, as prefill does."""
    known = len(cache.match(tokens(text)))
    for end in range((known + 1) * SPAN, len(text) + 1, SPAN):
        cache.insert(tokens(text[end - SPAN : end]), left(text[:end]))


def found(cache: PrefixCache, text: str) -> str:
    """The beginning of `text` that is cached. Checks the entries of its blocks."""
    states = cache.match(tokens(text))
    for number, state in enumerate(states, start=1):
        expected = left(text[: number * SPAN])
        assert np.array_equal(state["keys"], expected["keys"])
    return text[: len(states) * SPAN]


def test_whole_blocks_from_the_beginning_are_found() -> None:
    cache = PrefixCache(SPAN, 10**6)
    keep(cache, "abcdefghi")
    assert found(cache, "abcdefghi") == "abcdefghi"
    assert found(cache, "abcdefghijk") == "abcdefghi"
    assert found(cache, "abcdefgh") == "abcdef"
    assert found(cache, "abcdeX") == "abc"
    assert found(cache, "defghi") == ""
    assert found(cache, "ab") == found(cache, "") == ""


def test_prompts_share_the_blocks_of_their_common_beginning() -> None:
    cache = PrefixCache(SPAN, 10**6)
    keep(cache, "abcdef")
    keep(cache, "abcxyz")
    keep(cache, "abcdef")
    assert cache.nbytes == 3 * (SPAN * 8 + 2 * 5 * 4)
    assert (found(cache, "abcdef"), found(cache, "abcxyz")) == ("abcdef", "abcxyz")


def test_the_least_recently_used_block_is_dropped_after_its_children() -> None:
    cache = PrefixCache(SPAN, 4 * (SPAN * 8 + 2 * 5 * 4))
    keep(cache, "abcdefghi")
    keep(cache, "xyz")
    assert found(cache, "abcdefghi") == "abcdefghi"
    keep(cache, "uvw")  # drops xyz
    assert (found(cache, "xyz"), found(cache, "abcdefghi")) == ("", "abcdefghi")
    keep(cache, "rst")  # uvw is older than abc…
    keep(cache, "opq")  # drops the end of abc…, not its beginning
    assert found(cache, "abcdefghi") == "abcdef"


def test_a_block_without_its_parent_is_not_cached() -> None:
    size = SPAN * 8 + 2 * 5 * 4
    cache = PrefixCache(SPAN, 2 * size)
    keep(cache, "abcdefghijkl")  # ghi has no room, so jkl has no parent
    assert cache.nbytes == 2 * size
    assert found(cache, "abcdefghijkl") == "abcdef"
    keep(cache, "xyz")
    assert (found(cache, "abcdef"), found(cache, "xyz")) == ("abc", "xyz")


@pytest.mark.parametrize("known", ["", "abc", "abcdef"])
def test_a_prompt_that_is_pushed_already_resumes_if_it_is_cached(known: str) -> None:
    cache = PrefixCache(SPAN, 10**6)
    keep(cache, known)
    cache.resume(tokens("abcdefg"), 2)
    cache.insert(tokens("ghi"), left("abcdefghi"))
    assert found(cache, "abcdefghi") == ("abcdefghi" if known == "abcdef" else known)


@contextmanager
def moves() -> Iterator[list[int]]:
    """Counts the blocks that move in the order of use."""
    seen: list[int] = []

    def profile(_: FrameType, event: str, called: object) -> None:
        if event == "c_call" and getattr(called, "__name__", "") == "move_to_end":
            seen.append(1)

    sys.setprofile(profile)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def test_an_insert_costs_the_same_at_any_position() -> None:
    """The last insert of a long prompt moves no more blocks than the first."""
    cache = PrefixCache(SPAN, 10**6)
    with moves() as looked:
        keep(cache, "abc" * 200)
        assert looked == []
        assert found(cache, "abc" * 200) == "abc" * 200
    assert len(looked) == 2 * 200, "once for the prompt that ended, once for the one that begins"


def test_a_block_above_the_limit_is_not_cached() -> None:
    cache = PrefixCache(SPAN, 10)
    keep(cache, "abcdef")
    assert (cache.nbytes, found(cache, "abcdef")) == (0, "")


@pytest.mark.parametrize("seed", range(20))
def test_any_course_of_events(seed: int) -> None:
    chance = random.Random(seed)
    size = SPAN * 8 + 2 * 5 * 4
    cache, known = PrefixCache(SPAN, 6 * size), set[str]()
    for _ in range(300):
        text = "".join(chance.choice("ab") for _ in range(chance.randrange(13)))
        beginning = found(cache, text)
        assert all(beginning[:end] in known for end in range(SPAN, len(beginning) + 1, SPAN))
        if chance.random() < 0.5:
            keep(cache, text)
            known |= {text[:end] for end in range(SPAN, len(text) + 1, SPAN)}
            assert found(cache, text) == text[: len(text) // SPAN * SPAN]
        assert cache.nbytes <= 6 * size
        assert cache.nbytes == size * len(cache)


@pytest.mark.parametrize("kept", [0, 1, SPAN])
@pytest.mark.parametrize("newest", range(4))
@pytest.mark.parametrize("first", range(3))
def test_what_blocks_add_is_the_stack_that_they_left(first: int, newest: int, kept: int) -> None:
    """An entry is its token's number; a summary is that of its block's first token, and a half."""
    stack, parts = np.zeros((2, 0, 5)), []
    for block in range(9):
        raw = np.arange(block * SPAN, (block + 1) * SPAN) + np.zeros((2, 5, SPAN))
        stack = np.concatenate((stack, raw.swapaxes(1, 2)), axis=1)
        left = block - newest  # the window, if it is no longer one of the first blocks
        is_folded = left >= first and kept < SPAN
        if is_folded:
            begin = stack.shape[1] - (1 + newest) * SPAN
            summary = np.full((2, kept, 5), left * SPAN + 0.5)
            stack = np.concatenate((stack[:, :begin], summary, stack[:, begin + SPAN :]), axis=1)
        taken = kept + newest * SPAN if is_folded else SPAN
        if is_folded and not kept:
            taken = SPAN if newest else 0
        part = stack[:, stack.shape[1] - taken :]
        parts.append(added(part, SPAN, is_folded and kept == 1))
        assert parts[-1].shape[1] <= SPAN + 1
        folded = range(first, max(first, left + 1)) if kept < SPAN else range(0)
        assert np.array_equal(joined(parts, SPAN, folded), stack)
