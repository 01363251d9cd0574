"""Policy, and nothing else: what the engine does next, from what it holds now."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

_RESTORE, _JOIN, _BEGIN = range(3)  # ways to a slot, in the order of turns among equals


class Waiting(NamedTuple):
    """A stream in the queue."""

    to_prefill: int
    """Prompt tokens to push before it can join the batch."""
    needs_slot: bool
    """Whether it needs a slot then."""
    priority: int = 0


class Bench(NamedTuple):
    """The stream on the bench."""

    left: int
    """Prompt tokens left to push."""
    joins: bool
    """Whether it needs a slot afterwards."""
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
    bench: Bench | None
    prefill_room: int
    """Tokens the bench takes in one pass."""
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
    seat: bool = False
    """Put the stream that is then at the head of the queue on the bench."""
    join: bool = False
    """Move the stream on the bench, its prompt pushed, into the batch."""
    prefill: int = 0
    """Tokens to push for the stream on the bench."""
    decode: bool = False
    """One step for every stream of the batch."""

    @property
    def idle(self) -> bool:
        """Nothing to do."""
        return self == Plan()


def plan(load: Load) -> Plan:
    """First come, first served within a priority; a higher one takes the slots of a lower one.

    Among equals, paused streams come back before the stream on the bench joins, and that before
    new ones. Prefill runs freely while nobody decodes; otherwise only while its credit lasts.
    """
    bench, free, preempt = load.bench, load.num_free, 0
    joining = (-bench.priority, _JOIN) if bench is not None and bench.joins else None
    claims = [(-priority, _RESTORE) for priority in load.returning]
    if joining is not None and bench is not None and not bench.left:
        claims.append(joining)
    ready = takewhile(lambda stream: not stream.to_prefill, load.waiting)
    claims += [(-stream.priority, _BEGIN) for stream in ready]
    granted: list[int] = []
    for claim in sorted(claims):
        # A stream on the bench has a claim to the next slot, or it would wait for ever.
        reserved = joining is not None and joining < claim and _JOIN not in granted
        if free > reserved:
            free -= 1
        elif preempt < len(load.yielding) and load.yielding[preempt] < -claim[0]:
            preempt += 1
        else:
            break
        granted.append(claim[1])
    restore, join, begin = (granted.count(way) for way in (_RESTORE, _JOIN, _BEGIN))

    seat = False
    if (join or bench is None) and begin < len(load.waiting):
        head, rest = load.waiting[begin], load.yielding[preempt:]
        gets_slot = free > 0 or (rest and rest[0] < head.priority) or not head.needs_slot
        seat = head.to_prefill > 0 and bool(gets_slot)

    decoding = load.num_running + len(granted) - preempt > 0
    prefill = 0
    if bench is not None and bench.left and (load.prefill_credit_s > 0 or not decoding):
        prefill = min(bench.left, load.prefill_room)
    return Plan(preempt, restore, begin, seat, join > 0, prefill, decoding)


def next_credit(credit_s: float, share: float, prefill_s: float, decode_s: float) -> float:
    """Prefill credit after a turn: decode time earns it so that prefill gets `share` of all time.

    Unused credit is not saved up for long, so that a burst of prompts cannot stall the streams.
    Prefill while nobody decodes takes nothing from anyone, and leaves no debt.
    """
    if not decode_s:
        return 0.0
    earned = decode_s * share / (1 - share)
    return min(credit_s + earned - prefill_s, earned)
