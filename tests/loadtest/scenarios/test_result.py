"""Which streams a chaos run may lose."""

from __future__ import annotations

import time
from unittest.mock import create_autospec

from concertina.client import Accepted
from loadtest.scenarios.result import Kill, Result


def stream(*, durable: bool) -> Accepted:
    accepted: Accepted = create_autospec(Accepted, instance=True)
    accepted.stream_id, accepted.durable = "s", durable
    return accepted


def test_only_a_kill_may_lose_a_stream_that_is_nowhere_else() -> None:
    before, after = Kill(1.0, False, frozenset()), Kill(3.0, False, frozenset({"other"}))
    stored = Kill(4.0, False, frozenset({"s"}))
    for kills, durable, may in (
        ([], False, False),
        ([before], False, False),
        ([before, after], False, True),
        ([before, after], True, False),
        ([before, stored], False, False),
        ([before, after, stored], False, False),
    ):
        result = Result(killed=kills)
        assert result.may_lose(stream(durable=durable), since=2.0) == may


def test_without_a_kill_a_stream_is_accepted_soon() -> None:
    result = Result()
    result.accepted(9.0, most=10.0)
    assert result.wrong == []
    result.accepted(11.0, most=10.0)
    assert result.wrong == ["a stream was accepted after 11 s"]
    killed = Result(killed=[Kill(time.monotonic() - 1.0, False, frozenset())])
    killed.accepted(11.0, most=10.0)
    assert killed.wrong == []
