"""How many streams each key has, against how many it may."""

from __future__ import annotations

from collections.abc import Callable

from server.auth.api_keys import Caller
from server.errors import InvalidRequest, QuotaExceeded


def require_room(caller: Caller, running: Callable[[str], int], more: int) -> None:
    """That a caller, by whose name `running` counts streams, may have so many more.

    Raises QuotaExceeded when they are too many now, InvalidRequest when they always are.
    """
    limit = caller.max_streams
    if limit is None or (has := running(caller.name)) + more <= limit:
        return
    allowed = f"key {caller.name!r} may have {limit} at once"
    if more > limit:
        raise InvalidRequest(f"{more} streams were asked for: {allowed}; ask for fewer")
    raise QuotaExceeded(
        f"{has} streams are running or waiting, {more} more were asked for, "
        f"and {allowed}; try again when some have ended"
    )
