"""The grammar of one stream: which tokens may come next, as a function of those that came."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from concertina.codecs.token_text import TokenText
from server.arrays import Bools
from server.request import Matcher, Request


class GrammarState:
    """Where an output stands in its grammar, also while the stream is parked.

    beginning: of the grammar alone, which knows no end tokens.
    """

    def __init__(self, beginning: Matcher, request: Request, text: TokenText) -> None:
        self._matcher = beginning.copy()
        # A stop token that is text follows the grammar as text does.
        stops = {token for token in request.stop_tokens if not text.pieces[token]}
        self._ends = request.end_tokens | stops
        self._end_ids = np.array(sorted(self._ends), np.int64)
        before = chain((request.prompt.start,), request.prompt.tokens)
        self._is_beginning = text.is_beginning(before)
        self._text = text

    @staticmethod
    def of(request: Request, text: TokenText) -> GrammarState | None:
        """The state of a stream that has generated no token; None if it has no grammar."""
        grammar = request.sampling.grammar
        return None if grammar is None else GrammarState(grammar.beginning, request, text)

    def allowed(self) -> Bools:
        """Whether each token may come next, `[V]`; none may if there is a `fault`."""
        allowed, may_end = self._matcher.allowed()
        allowed[self._end_ids] = may_end
        if self._is_beginning:
            # These would be sent as another text than the grammar takes them for.
            allowed[self._text.altered_first] = False
        return allowed

    def push(self, tokens: Sequence[int]) -> None:
        """Add tokens to the output."""
        pushed = [token for token in tokens if token not in self._ends]
        if pushed:
            self._is_beginning = False
            self._matcher.push(pushed)

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow but an end."""
        return self._matcher.is_complete

    @property
    def fault(self) -> str:
        """Why the grammar cannot be followed further; empty if it can."""
        return self._matcher.fault
