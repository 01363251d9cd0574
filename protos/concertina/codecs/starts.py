"""What a model reads before the first token of a stream: its start token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from concertina.codecs.prompt_error import PromptError
from concertina.codecs.token_text import Ids
from concertina.shown import listed, shown


@dataclass(frozen=True)
class LabelStarts:
    """Start tokens beyond a vocabulary: its size is the one without a label, then come the labels.

    model: its name, for messages.
    """

    model: str
    vocabulary: int
    labels: tuple[str, ...] = ()

    def split(self, ids: Ids, label: str | None) -> tuple[int, Ids]:
        """The start token of a prompt, and the tokens after it. Raises PromptError."""
        if label is None:
            return self.vocabulary, ids
        if label not in self.labels:
            names = listed(map(repr, self.labels)) or "none"
            raise PromptError("label", f"is {shown(label)}; {self.model} has these labels: {names}")
        return self.vocabulary + 1 + self.labels.index(label), ids

    def joined(self, start: int, ids: Ids) -> Ids:
        """The ids of the prompt that `split` makes this of."""
        return ids

    def label_of(self, start: int) -> str | None:
        """The label that a start token stands for; None for the one without."""
        index = start - self.vocabulary - 1
        return self.labels[index] if index >= 0 else None

    def allows(self, start: int) -> bool:
        """Whether this is a start token."""
        return 0 <= start - self.vocabulary <= len(self.labels)


@dataclass(frozen=True)
class TokenStarts:
    """Start tokens of the vocabulary: its begin token or, if it has none, the prompt's first token.

    model: its name, for messages. begin: the begin token.
    """

    model: str
    vocabulary: int
    begin: int | None = None

    def split(self, ids: Ids, label: str | None) -> tuple[int, Ids]:
        """The start token of a prompt, and the tokens after it. Raises PromptError."""
        if label is not None:
            raise PromptError("label", f"is {shown(label)}; {self.model} has these labels: none")
        if self.begin is None and not len(ids):
            raise PromptError(
                "", f"is empty, but {self.model} has no begin token: give at least 1 token"
            )
        if self.begin is None:
            return int(ids[0]), ids[1:]
        return self.begin, ids[1:] if len(ids) and ids[0] == self.begin else ids

    def joined(self, start: int, ids: Ids) -> Ids:
        """The ids of the prompt that `split` makes this of."""
        return ids if self.begin is not None else np.concatenate(([start], ids))

    def label_of(self, start: int) -> None:
        """None: there are no labels."""

    def allows(self, start: int) -> bool:
        """Whether this is a start token."""
        return 0 <= start < self.vocabulary if self.begin is None else start == self.begin
