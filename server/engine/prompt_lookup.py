"""Prompt lookup: guesses the next tokens of a stream from an earlier occurrence of its last tokens.

See Saxena (2023), and n-gram speculation in vLLM. It helps where text repeats itself, as code does.
A draft needs no second model. Draft tokens that the model does not draw are dropped.
"""

from __future__ import annotations

from array import array

WINDOW = 8192
"""Number of tokens to search. It is fixed, so that the cost does not grow with the stream."""

_SUFFIX_TOKENS = (12, 6, 4)  # lengths of the suffix to find, in the order of the attempts


def propose(recent: array[int], size: int) -> array[int]:
    """A draft of at most `size` tokens after `recent`; empty if none of its suffixes recurs."""
    content, width = recent.tobytes(), recent.itemsize
    for length in _SUFFIX_TOKENS:
        if len(recent) <= length:
            continue
        suffix, end = content[-length * width :], len(content) - width
        at = content.rfind(suffix, 0, end)
        while at % width and at >= 0:  # a match that begins inside a token is none
            at = content.rfind(suffix, 0, at + len(suffix) - 1)
        if at >= 0:
            begin = at // width + length
            return recent[begin : begin + size]
    return recent[:0]
