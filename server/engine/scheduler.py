"""The scheduling policy: plans the next turn from what the engine holds. Has no side effects."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from itertools import takewhile
from typing import NamedTuple


class Waiting(NamedTuple):
    """A stream in the queue."""

    to_prefill: int
    """Number of prompt tokens to push before it can join the batch."""
    needs_slot: bool
    """Whether it needs a slot after prefill; scoring needs none."""
    priority: int = 0


class Prefilling(NamedTuple):
    """The stream in the prefill slot."""

    left: int
    """Number of prompt tokens left to push."""
    joins: bool
    """Whether it needs a slot after prefill; scoring needs none."""
    priority: int = 0


@dataclass(frozen=True)
class Load:
    """What the engine holds: the input of the policy."""

    num_running: int
    num_free: int
    preemptible: tuple[int, ...]
    """Priorities of the running streams that may be parked, lowest first."""
    returning: tuple[int, ...]
    """Priorities of the paused streams whose readers have caught up, highest first."""
    waiting: tuple[Waiting, ...]
    """The first streams of the queue, which is ordered by priority, then by arrival."""
    prefilling: Prefilling | None
    prefill_room: int
    """Largest number of tokens that the prefill slot takes in one pass."""
    prefill_credit_s: float
    """Seconds that prefill may still take from the running streams."""


@dataclass(frozen=True)
class Plan:
    """What to do in one turn of the loop, in the order of the fields."""

    preempt: int = 0
    """Number of running streams to park, lowest priority first, for others of higher priority."""
    restore: int = 0
    """Number of paused streams that get a slot again."""
    begin: int = 0
    """Number of streams at the head of the queue that join the batch, as they need no prefill."""
    join: bool = False
    """Move the stream in the prefill slot into the batch: its prompt is pushed."""
    prefill: int = 0
    """Number of tokens to push for the stream in the prefill slot."""
    start_prefill: bool = False
    """Give the prefill slot to the stream that is at the head of the queue by then."""
    decode: bool = False
    """Run one step for all streams of the batch."""

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self == _IDLE


_IDLE = Plan()
DECODE = Plan(decode=True)
"""What is planned while streams run, and none is in another place."""


class _Source(IntEnum):
    """Where a stream that claims a slot comes from. Within a priority, the lowest goes first."""

    RESTORE = 0
    JOIN = 1
    BEGIN = 2


class _Claim(NamedTuple):
    """A stream's claim to a slot. Claims are granted in ascending order."""

    rank: int
    """Its priority, negated."""
    source: _Source


def plan(load: Load) -> Plan:
    """Plan the next turn: first come, first served within a priority.

    A stream of higher priority takes the slot of one of lower priority. Within a priority, paused
    streams go first, then the prefilled one, then new ones. Prefill runs without limit while no
    stream decodes; else only while its credit lasts.
    """
    granted, preempt = _grant(load)
    by_source = Counter(claim.source for claim in granted)
    free = load.num_free + preempt - len(granted)
    decoding = load.num_running + len(granted) > preempt
    return Plan(
        preempt=preempt,
        restore=by_source[_Source.RESTORE],
        begin=by_source[_Source.BEGIN],
        join=by_source[_Source.JOIN] > 0,
        prefill=_prefill(load, decoding),
        start_prefill=_starts_prefill(load, by_source, free, preempt),
        decode=decoding,
    )


def _claims(load: Load) -> list[_Claim]:
    """All claims to a slot, in the order in which they are granted."""
    claims = [_Claim(-priority, _Source.RESTORE) for priority in load.returning]
    if load.prefilling is not None and load.prefilling.joins and not load.prefilling.left:
        claims.append(_Claim(-load.prefilling.priority, _Source.JOIN))
    ready = takewhile(lambda stream: not stream.to_prefill, load.waiting)
    claims += [_Claim(-stream.priority, _Source.BEGIN) for stream in ready]
    return sorted(claims)


def _grant(load: Load) -> tuple[list[_Claim], int]:
    """The claims that get a slot, and the number of running streams to park for them."""
    granted: list[_Claim] = []
    free, preempt = load.num_free, 0
    reserved = None
    if load.prefilling is not None and load.prefilling.joins:
        # The next free slot is reserved for the stream in prefill, or it might never get one.
        reserved = _Claim(-load.prefilling.priority, _Source.JOIN)
    for claim in _claims(load):
        if free > (reserved is not None and reserved < claim and reserved not in granted):
            free -= 1
        elif preempt < len(load.preemptible) and load.preemptible[preempt] < -claim.rank:
            preempt += 1
        else:
            break
        granted.append(claim)
    return granted, preempt


def _starts_prefill(load: Load, by_source: Counter[_Source], free: int, preempt: int) -> bool:
    """Whether the head of the queue gets the prefill slot: it must get a slot afterwards, too."""
    slot_is_free = load.prefilling is None or by_source[_Source.JOIN] > 0
    if not slot_is_free or by_source[_Source.BEGIN] >= len(load.waiting):
        return False
    head, preemptible = load.waiting[by_source[_Source.BEGIN]], load.preemptible[preempt:]
    gets_slot = free > 0 or any(priority < head.priority for priority in preemptible[:1])
    return head.to_prefill > 0 and (gets_slot or not head.needs_slot)


def _prefill(load: Load, decoding: bool) -> int:
    """Number of tokens to push in the prefill slot."""
    if load.prefilling is None or (decoding and load.prefill_credit_s <= 0):
        return 0
    return min(load.prefilling.left, load.prefill_room)


def next_credit(credit_s: float, share: float, prefill_s: float, decode_s: float) -> float:
    """Prefill credit in seconds after a turn.

    Decode time earns credit and prefill time spends it, so that prefill gets `share` of all time.
    Credit never exceeds what one turn earns: a burst of prompts cannot stall the running streams.
    Prefill while no stream decodes delays nothing, so it leaves no debt.
    """
    if not decode_s:
        return 0.0
    earned = decode_s * share / (1 - share)
    return min(credit_s + earned - prefill_s, earned)
