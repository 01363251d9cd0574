"""What a codec says of a prompt that it cannot turn into tokens."""

from __future__ import annotations


class PromptError(ValueError):
    """A prompt that cannot become tokens. The message goes on after the name of the field.

    field: its name below `prompt`, such as `image.png`; empty for the prompt as a whole.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
