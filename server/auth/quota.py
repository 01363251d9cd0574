"""The limit on the number of streams of each key."""

from __future__ import annotations

from collections.abc import Callable

from server.auth.api_keys import Caller
from server.errors import InvalidRequest, QuotaExceeded


def require_room(
    caller: Caller, running: Callable[[str], int], more: int, room_after_s: Callable[[int], float]
) -> None:
    """Check that a caller may start `more` streams. `running` counts the streams of a key name.

    room_after_s: the seconds until so many streams of the caller have ended. Raises QuotaExceeded
    if there are too many now, InvalidRequest if `more` is above the limit.
    """
    limit = caller.max_streams
    if limit is None or (has := running(caller.name)) + more <= limit:
        return
    allowed = f"key {caller.name!r} may have {limit} at the same time"
    if more > limit:
        raise InvalidRequest(f"the request needs {more} streams, but {allowed}; ask for fewer")
    raise QuotaExceeded(
        f"{has} streams run or wait and the request needs {more} more, but {allowed}; "
        "try again when some have ended",
        room_after_s(has + more - limit),
    )
