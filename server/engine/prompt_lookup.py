"""Drafts of what a stream may say next: what followed the last time that it said the same.

Prompt lookup (Saxena, 2023; vLLM's n-gram speculation): text that copies, such as code, repeats
itself. A draft costs no model; what the model would not have drawn is thrown away.
"""

from __future__ import annotations

from array import array

WINDOW = 8192
"""Tokens that are looked through: enough to find what repeats, and the same at any length."""

_LENGTHS = (12, 6, 4)  # of what has to be the same, tried one after the other


def propose(recent: array[int], size: int) -> array[int]:
    """At most `size` tokens that may follow the `recent` ones; none if nothing suggests any."""
    content, width = recent.tobytes(), recent.itemsize
    for length in _LENGTHS:
        if len(recent) <= length:
            continue
        said, end = content[-length * width :], len(content) - width
        at = content.rfind(said, 0, end)
        while at % width and at >= 0:  # between two tokens
            at = content.rfind(said, 0, at + len(said) - 1)
        if at >= 0:
            begin = at // width + length
            return recent[begin : begin + size]
    return recent[:0]
