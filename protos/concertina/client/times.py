"""Times that a caller gives, in seconds: deadlines, and how long to keep or to try."""

from __future__ import annotations

from typing import Final

from concertina.client.errors import InvalidRequest
from concertina.shown import shown

# gRPC takes a deadline that is centuries away for one that has passed.
_LONGEST_TIMEOUT_S: Final = 10 * 365 * 24 * 3600.0
_LONGEST_DURATION_S: Final = 315_576_000_000.0  # what google.protobuf.Duration holds


def timeout_seconds(timeout: float | None) -> float | None:
    """A call's timeout as gRPC takes it; None for no timeout, which infinity is, too.

    Raises InvalidRequest.
    """
    if timeout is None:
        return None
    seconds = _number("timeout", timeout)
    if not seconds > 0:
        raise InvalidRequest(
            f"timeout is {seconds:g} s: it must be above 0; None or infinity is no timeout",
            field="timeout",
            limit=0,
        )
    return None if seconds > _LONGEST_TIMEOUT_S else seconds


def patience_seconds(name: str, patience: float) -> float:
    """A time to go on trying, which may be infinite. Raises InvalidRequest."""
    seconds = _number(name, patience)
    if not seconds >= 0:
        raise InvalidRequest(f"{name} is {seconds:g} s: it must be 0 or more", field=name, limit=0)
    return seconds


def finite_seconds(name: str, time: float, most: float | None = None) -> float:
    """A time that a message can hold. Raises InvalidRequest, which says `most` as the limit."""
    seconds = _number(name, time)
    if not abs(seconds) <= _LONGEST_DURATION_S:
        limit = _LONGEST_DURATION_S if most is None else most
        raise InvalidRequest(
            f"{name} is {seconds:g} s: it must be a finite time, at most {limit:.0f}",
            field=name,
            limit=limit,
        )
    return seconds


def _number(name: str, value: float) -> float:
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        what = f"{name} is not a number of seconds: {shown(value)}"
        raise InvalidRequest(what, field=name) from None
