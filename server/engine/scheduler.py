"""Policy, and nothing else: what the engine does next, from what it holds now."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from itertools import takewhile
from typing import NamedTuple


class Waiting(NamedTuple):
    """A stream in the queue."""

    to_prefill: int
    """Prompt tokens to push before it can join the batch."""
    needs_slot: bool
    """Whether it needs a slot then."""
    priority: int = 0


class Prefilling(NamedTuple):
    """The stream in the prefill slot."""

    left: int
    """Prompt tokens left to push."""
    joins: bool
    """Whether it needs a slot of the batch afterwards."""
    priority: int = 0


@dataclass(frozen=True)
class Load:
    """What the engine holds."""

    num_running: int
    num_free: int
    yielding: tuple[int, ...]
    """Priorities of the running streams, lowest first: the order in which they would be parked."""
    returning: tuple[int, ...]
    """Priorities of the paused streams whose readers have caught up, highest first."""
    waiting: tuple[Waiting, ...]
    """The head of the queue, which is ordered by priority, then by arrival."""
    prefilling: Prefilling | None
    prefill_room: int
    """Tokens the prefill slot takes in one pass."""
    prefill_credit_s: float
    """Time that prefill may still take from the running streams."""


@dataclass(frozen=True)
class Plan:
    """What to do in one turn of the loop, in this order."""

    preempt: int = 0
    """Running streams to park, the lowest priority first, for others of a higher one."""
    restore: int = 0
    """Returning streams that get their slot back."""
    begin: int = 0
    """Streams at the head of the queue that join the batch at once, having nothing to prefill."""
    join: bool = False
    """Move the stream in the prefill slot, its prompt pushed, into the batch."""
    prefill: int = 0
    """Tokens to push for the stream in the prefill slot."""
    start_prefill: bool = False
    """Give the prefill slot to the stream that is then at the head of the queue."""
    decode: bool = False
    """One step for every stream of the batch."""

    @property
    def idle(self) -> bool:
        """Nothing to do."""
        return self == Plan()


class _Way(IntEnum):
    """Ways to a slot, in the order of turns among equal priorities."""

    RESTORE = 0
    JOIN = 1
    BEGIN = 2


class _Claim(NamedTuple):
    """A stream's claim to a slot; claims are granted in their order."""

    rank: int
    """Its priority, negated."""
    way: _Way


def plan(load: Load) -> Plan:
    """First come, first served within a priority; a higher one takes the slots of a lower one.

    Among equals, paused streams come back before the prefilled stream joins, and that before new
    ones. Prefill runs freely while nobody decodes; otherwise only while its credit lasts.
    """
    granted, preempt = _grant(load)
    by_way = Counter(claim.way for claim in granted)
    free = load.num_free + preempt - len(granted)
    decoding = load.num_running + len(granted) > preempt
    return Plan(
        preempt=preempt,
        restore=by_way[_Way.RESTORE],
        begin=by_way[_Way.BEGIN],
        join=by_way[_Way.JOIN] > 0,
        prefill=_prefill(load, decoding),
        start_prefill=_starts_prefill(load, by_way, free, preempt),
        decode=decoding,
    )


def _claims(load: Load) -> list[_Claim]:
    """All claims to a slot, in the order in which they are granted."""
    claims = [_Claim(-priority, _Way.RESTORE) for priority in load.returning]
    if load.prefilling is not None and load.prefilling.joins and not load.prefilling.left:
        claims.append(_Claim(-load.prefilling.priority, _Way.JOIN))
    ready = takewhile(lambda stream: not stream.to_prefill, load.waiting)
    claims += [_Claim(-stream.priority, _Way.BEGIN) for stream in ready]
    return sorted(claims)


def _grant(load: Load) -> tuple[list[_Claim], int]:
    """The claims that get a slot, and how many running streams are parked for them."""
    granted: list[_Claim] = []
    free, preempt = load.num_free, 0
    reserved = None
    if load.prefilling is not None and load.prefilling.joins:
        # A stream being prefilled has a claim to the next slot, or it would wait for ever.
        reserved = _Claim(-load.prefilling.priority, _Way.JOIN)
    for claim in _claims(load):
        if free > (reserved is not None and reserved < claim and reserved not in granted):
            free -= 1
        elif preempt < len(load.yielding) and load.yielding[preempt] < -claim.rank:
            preempt += 1
        else:
            break
        granted.append(claim)
    return granted, preempt


def _starts_prefill(load: Load, by_way: Counter[_Way], free: int, preempt: int) -> bool:
    """Whether the prefill slot is free, and the head of the queue wants it and then gets a slot."""
    slot_is_free = load.prefilling is None or by_way[_Way.JOIN] > 0
    if not slot_is_free or by_way[_Way.BEGIN] >= len(load.waiting):
        return False
    head, yielding = load.waiting[by_way[_Way.BEGIN]], load.yielding[preempt:]
    gets_slot = free > 0 or any(priority < head.priority for priority in yielding[:1])
    return head.to_prefill > 0 and (gets_slot or not head.needs_slot)


def _prefill(load: Load, decoding: bool) -> int:
    """Tokens to push in the prefill slot."""
    if load.prefilling is None or (decoding and load.prefill_credit_s <= 0):
        return 0
    return min(load.prefilling.left, load.prefill_room)


def next_credit(credit_s: float, share: float, prefill_s: float, decode_s: float) -> float:
    """Prefill credit after a turn: decode time earns it so that prefill gets `share` of all time.

    Unused credit is not saved up for long, so that a burst of prompts cannot stall the streams.
    Prefill while nobody decodes takes nothing from anyone, and leaves no debt.
    """
    if not decode_s:
        return 0.0
    earned = decode_s * share / (1 - share)
    return min(credit_s + earned - prefill_s, earned)
