from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from concertina.codecs.token_text import TokenText
from server.engine.sampling.bad_words import BadWords
from server.engine.sampling.logits_processors import PenaltyState, ProcessorBatch
from server.engine.sampling.long_rows import LONG_ROW
from server.request import LogitsProcessors, prompt_of

_PIECES = (b"", b"a", b"b", b"ab", b"ba", b"aab", b"\xc3", b"\xa9b", b"\xff", b"\xff\xffa")
_Word = st.lists(st.sampled_from([b"a", b"b", b"\xc3", b"\xa9", b"\xff"]), min_size=1, max_size=6)


@given(
    st.lists(_Word.map(b"".join), min_size=1, max_size=4),
    st.lists(st.integers(0, len(_PIECES) - 1), max_size=12),
)
@example([b"abab"], [3, 0])
@example([b"\xff\xff\xff"], [8, 8])
def test_a_token_is_forbidden_if_a_word_would_end_inside_it(
    words: list[bytes], output: list[int]
) -> None:
    """By definition: the bytes of the output with the token, searched from the start."""
    watched = BadWords(words, TokenText(_PIECES))
    for token in output:
        watched.push(token)
    before = b"".join(_PIECES[token] for token in output)
    expected = {
        token
        for token, piece in enumerate(_PIECES)
        for word in words
        if piece and word in (before + piece)[max(0, len(before) - len(word) + 1) :]
    }
    assert {*watched.forbidden().tolist()} == expected


def test_a_batch_draws_no_bad_word_and_each_stream_has_its_own() -> None:
    text, vocabulary = TokenText(_PIECES), len(_PIECES)
    states = [
        PenaltyState.of(
            LogitsProcessors(bad_bytes=(word,)), prompt_of(0, [], "B"), vocabulary, text
        )
        for word in (b"abb", b"aa")
    ]
    states[0].recall(np.array([1]))  # "a", generated before
    batch = ProcessorBatch.of([states[0], None, states[1]])
    assert batch is not None
    logits, positions = np.zeros((3, vocabulary), np.float32), np.zeros(3, np.int64)

    def forbidden() -> list[list[int]]:
        changed = batch.apply(logits, positions)
        return [np.flatnonzero(np.isneginf(row)).tolist() for row in changed]

    assert forbidden() == [[], [], [5]]
    batch.remember(np.array([2, 2, 1]))  # "b", "b", "a"
    assert forbidden() == [[2, 4], [], [1, 3, 5]]
    again = ProcessorBatch.of([states[1], states[0]])  # in other rows
    assert again is not None
    changed = again.apply(logits[:2], positions[:2])
    assert np.flatnonzero(np.isneginf(changed[1])).tolist() == [2, 4]


def test_the_same_words_are_forbidden_in_a_large_vocabulary() -> None:
    text = TokenText((*_PIECES, *(b"",) * (LONG_ROW - len(_PIECES))))
    prompt = prompt_of(0, [], "I")
    states = [
        PenaltyState.of(LogitsProcessors(bad_bytes=(word,)), prompt, LONG_ROW, text)
        for word in (b"abb", b"aa")
    ]
    states[0].recall(np.array([1]))  # "a", generated before
    batch = ProcessorBatch.of(states)
    assert batch is not None
    logits = np.zeros(LONG_ROW, np.float32)

    def forbidden(owner: int) -> list[int]:
        changed = batch.apply_to(owner, logits, 0, np.empty(LONG_ROW))
        return np.flatnonzero(np.isneginf(changed)).tolist()

    assert (forbidden(0), forbidden(1)) == ([], [5])
    batch.remember(np.array([2, 1]))  # "b", "a"
    assert (forbidden(0), forbidden(1)) == ([2, 4], [1, 3, 5])
    batch.remember(np.array([-1, -1]))  # nothing is drawn
    assert (forbidden(0), forbidden(1)) == ([2, 4], [1, 3, 5])
