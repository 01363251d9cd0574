"""What a model reads before the first token of a stream: its start token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from concertina.codecs.prompt_error import PromptError
from concertina.shown import listed, shown

Ids = npt.NDArray[np.int64]
"""Token ids `[n]`."""


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
