"""Values of callers as messages show them: short, whatever they are."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from itertools import islice
from reprlib import Repr
from typing import Final

MOST_CHARACTERS: Final = 1000
_VALUE_CHARACTERS: Final = 100
_NAME_CHARACTERS: Final = 80
_NAMES: Final = 20


def shown(value: object) -> str:
    """The value as Python writes it; of a long one the beginning, and how long it is."""
    text = cut(_brief(value), _VALUE_CHARACTERS)
    is_long = isinstance(value, Sized) and len(value) > len(text)
    return f"{text} (length {len(value):,})" if is_long else text  # type: ignore[arg-type]


def cut(text: str, most: int = MOST_CHARACTERS) -> str:
    """The text, or as much of its beginning as `most` characters hold, with an ellipsis."""
    return text if len(text) <= most else text[: most - 1] + "…"


def listed(names: Iterable[str]) -> str:
    """Names with commas between them: the first of them, and how many others there are."""
    names = list(names)
    first = ", ".join(cut(name, _NAME_CHARACTERS) for name in islice(names, _NAMES))
    return first if len(names) <= _NAMES else f"{first} and {len(names) - _NAMES:,} others"


def _brief(value: object) -> str:
    # `repr` of a value with many items takes as long as they need, so it is not tried first.
    brief = Repr()
    brief.maxlevel = 3
    brief.maxstring = brief.maxother = brief.maxlong = _VALUE_CHARACTERS
    try:
        return brief.repr(value)
    except Exception:  # a value that cannot be written: an int of 5,000 digits, a broken __repr__
        return f"<{type(value).__name__}>"
