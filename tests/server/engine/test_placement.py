from __future__ import annotations

from typing import Any

import pytest

from server.engine.placement import Placement


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ({"running": [1]}, True),
        ({}, False),
        ({"running": [1], "waiting": [2]}, False),
        ({"running": [1], "prefilling": 2}, False),
        ({"running": [1], "paused": [2]}, False),
    ],
)
def test_streams_only_run_where_no_other_place_holds_one(
    places: dict[str, Any], expected: bool
) -> None:
    """Who is overlooked here waits until all others have ended."""
    placement: Any = Placement(None, stream_buffer=8)  # type: ignore[arg-type]
    for place, streams in places.items():
        setattr(placement, place, streams)
    assert placement.only_runs is expected
