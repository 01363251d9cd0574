"""How many streams each key has, against how many it may."""

from __future__ import annotations

from collections import Counter

from server.errors import InvalidRequest, QuotaExceeded
from server.keys import Caller


class StreamQuota:
    """Streams that run or wait in this process, by caller. For one event loop."""

    def __init__(self) -> None:
        self._streams = Counter[str]()

    def require_room(self, caller: Caller, streams: int) -> None:
        """Raise QuotaExceeded when these streams are too many now, InvalidRequest when always."""
        limit, has = caller.max_streams, self._streams[caller.name]
        if limit is None or has + streams <= limit:
            return
        allowed = f"key {caller.name!r} may have {limit} at once"
        if streams > limit:
            raise InvalidRequest(f"{streams} streams were asked for: {allowed}; ask for fewer")
        raise QuotaExceeded(
            f"{has} streams are running or waiting, {streams} more were asked for, "
            f"and {allowed}; try again when some have ended"
        )

    def add(self, caller: Caller, streams: int) -> None:
        """These streams began."""
        self._streams[caller.name] += streams

    def remove(self, caller: Caller, streams: int) -> None:
        """These streams ended, or were left."""
        self._streams[caller.name] -= streams
