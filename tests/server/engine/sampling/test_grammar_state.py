"""What a grammar leaves of the tokens of a row, in small and large vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import numpy as np
import pytest

from concertina.codecs.token_text import TokenText
from server.arrays import Bools
from server.engine.sampling.grammar_state import GrammarState
from server.engine.sampling.logits_processors import PenaltyState
from server.engine.sampling.long_rows import LONG_ROW
from server.engine.sampling.sampler import (
    GRAMMAR_FAULT,
    NO_TOKEN_LEFT,
    SamplingBatch,
    failures,
    sample,
)
from server.errors import InvalidRequest
from server.request import Grammar, LogitsProcessors, Request, SamplingParameters, prompt_of

SIZES = [16, LONG_ROW]
END, STOP = 3, 4


class Counting:
    """Allows token n after n tokens, and an end after `end`."""

    def __init__(self, size: int, end: int, pushed: tuple[int, ...] = ()) -> None:
        self.size, self.end, self.pushed = size, end, pushed

    def copy(self) -> Counting:
        return Counting(self.size, self.end, self.pushed)

    def allowed(self) -> tuple[Bools, bool]:
        allowed = np.zeros(self.size, np.bool_)
        allowed[5 + len(self.pushed)] = not self.fault
        return allowed, len(self.pushed) >= self.end

    def push(self, tokens: Sequence[int]) -> None:
        self.pushed += tuple(tokens)

    def fits(self, tokens: Sequence[int]) -> bool:
        raise AssertionError

    is_complete = False

    @property
    def fault(self) -> str:
        return "" if self.pushed == tuple(range(5, 5 + len(self.pushed))) else "another token"


def text_of(size: int, **fields: object) -> TokenText:
    """Of tokens that are a space and their number, but for the first five."""
    pieces = [b""] * 5 + [b" %d" % number for number in range(5, size)]
    return TokenText(pieces, **fields)  # type: ignore[arg-type]


def state_of(size: int, end: int = 2, text: TokenText | None = None) -> GrammarState:
    """The state of a new stream with such a grammar."""
    request = Request(
        prompt_of(1, [], "H"),
        SamplingParameters(grammar=Grammar("regex", ("x",), Counting(size, end))),
        end_tokens=frozenset({END}),
        stop_tokens=frozenset({STOP, 9}),
    )
    made = GrammarState.of(request, text or text_of(size))
    assert made is not None
    return made


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_what_is_allowed_is_drawn(size: int, temperature: float) -> None:
    """Row 1 has no grammar; row 2 has logits processors, too."""
    parameters = [SamplingParameters(temperature, seed=seed) for seed in range(3)]
    likely = LogitsProcessors(bias=((7, 90.0),))
    penalties = PenaltyState.of(likely, prompt_of(1, [], "H"), size)
    states = [state_of(size, 9), None, state_of(size, 9)]
    batch = SamplingBatch.of(parameters, [None, None, penalties], states)
    logits = np.zeros((3, size), np.float32)
    logits[:, 8] = 50
    before = logits.copy()
    for step in range(4):
        drawn = sample(logits, batch, np.full(3, step))
        assert drawn.tolist() == [5 + step, 8, 5 + step]
        batch.remember(drawn)
    np.testing.assert_array_equal(logits, before)  # log-probabilities are the model's own


@pytest.mark.parametrize("size", SIZES)
def test_an_end_is_allowed_where_the_grammar_may_end(size: int) -> None:
    """By the model's end token, and by a stop token that is no text."""
    state = state_of(size)
    assert np.flatnonzero(state.allowed()).tolist() == [5]
    state.push([5])
    state.push([6])
    assert np.flatnonzero(state.allowed()).tolist() == [END, STOP, 7]
    state.push([END])
    assert not state.fault


@pytest.mark.parametrize("size", SIZES)
def test_what_cannot_go_on_is_an_error_of_its_row(size: int) -> None:
    gone, left = state_of(size), state_of(size)
    gone.push([7])
    none = LogitsProcessors(allowed=(9,))
    penalties = PenaltyState.of(none, prompt_of(1, [], "H"), size)
    parameters = [SamplingParameters(), SamplingParameters(), SamplingParameters()]
    batch = SamplingBatch.of(parameters, [None, None, penalties], [None, gone, left])
    logits = np.zeros((3, size), np.float32)
    drawn = sample(logits, batch, np.arange(3))
    assert drawn[0] >= 0 and drawn[1:].tolist() == [GRAMMAR_FAULT, NO_TOKEN_LEFT]
    failed = failures(logits, drawn, np.arange(3))
    assert sorted(failed) == [1, 2]
    assert isinstance(failed[1], InvalidRequest) and failed[1].field == "sampling.grammar"
    assert "position 1" in failed[1].message and "position 2" in failed[2].message
    batch.remember(drawn)  # draws nothing of these


@pytest.mark.parametrize(
    "altered", [{"strip": 1}, {"opening": MappingProxyType({5: b"5", 6: b" 6"})}], ids=str
)
def test_a_token_that_means_another_text_at_the_beginning_is_not_drawn_there(
    altered: dict[str, object],
) -> None:
    state = state_of(16, text=text_of(16, **altered))
    assert not state.allowed().any()
    state.push([5])
    assert state.allowed().any()
