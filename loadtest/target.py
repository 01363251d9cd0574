"""A server as the load tester sees it: what it serves, and ways to send it a request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

from concertina.v1 import bundle_pb2
from loadtest.record import Record
from loadtest.workload import Request


@dataclass(slots=True)
class Tally:
    """For a progress bar: streams that run and have ended, tokens so far."""

    running: int = 0
    ended: int = 0
    tokens: int = 0


Send: TypeAlias = Callable[[Request, int, Tally], Awaitable[Record]]
"""Runs one request, due at a reading of the clock, to its end.

A failure is not raised but recorded, even the cancellation of the calling task: an interrupted run
keeps what it observed.
"""


@dataclass(frozen=True, slots=True)
class Served:
    """The model that is driven.

    fingerprint: empty if the server does not tell it.
    context: most tokens of one stream, with its prompt; None if the server does not tell it.
    vocabulary: prompts are random ids below this number.
    begin_token: the token that the server puts before each prompt; None if it puts none.
    has_begin: whether the model can begin with nothing; for one that cannot, the first token of a
        prompt is not counted.
    manifest: from which the cost of a stream follows; None if the server does not tell it.
    """

    name: str
    vocabulary: int
    fingerprint: str = ""
    context: int | None = None
    begin_token: int | None = None
    has_begin: bool = True
    manifest: bundle_pb2.Manifest | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """An open server. senders: one for each connection; requests go to them in turns."""

    served: Served
    senders: tuple[Send, ...]
