"""Policy, and nothing else: what the engine does next, from what it holds now."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """What the engine holds."""

    num_running: int
    num_free: int
    num_returning: int
    """Paused streams whose readers have caught up."""
    waiting: tuple[tuple[int, bool], ...]
    """For the head of the queue: prompt tokens to push first, and whether a slot is needed then."""
    bench_left: int | None
    """Prompt tokens left to push for the stream on the bench; None when the bench is empty."""
    bench_joins: bool
    """Whether the stream on the bench needs a slot afterwards."""
    prefill_room: int
    """Tokens the bench takes in one pass."""
    prefill_credit_s: float
    """Time that prefill may still take from the running streams."""


@dataclass(frozen=True)
class Plan:
    """What to do in one turn of the loop, in this order."""

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
    """First come, first served; paused streams come back before new ones get a slot.

    Prefill runs freely while nobody decodes; otherwise only while its credit lasts.
    """
    free = load.num_free
    restore = min(load.num_returning, free)
    free -= restore

    join = load.bench_left == 0 and load.bench_joins and free > 0
    free -= join
    # A stream on the bench has a claim to the next slot, or it would wait for ever.
    reserved = load.bench_left is not None and load.bench_joins and not join
    begin = 0
    for tokens, _ in load.waiting:
        if tokens or begin >= free - reserved:
            break
        begin += 1
    free -= begin
    seat = False
    if (join or load.bench_left is None) and begin < len(load.waiting):
        tokens, needs_slot = load.waiting[begin]
        seat = tokens > 0 and (free > 0 or not needs_slot)

    decoding = load.num_running + restore + begin + join > 0
    prefill = 0
    if load.bench_left and (load.prefill_credit_s > 0 or not decoding):
        prefill = min(load.bench_left, load.prefill_room)
    return Plan(restore, begin, seat, join, prefill, decoding)


def next_credit(credit_s: float, share: float, prefill_s: float, decode_s: float) -> float:
    """Prefill credit after a turn: decode time earns it so that prefill gets `share` of all time.

    Unused credit is not saved up for long, so that a burst of prompts cannot stall the streams.
    Prefill while nobody decodes takes nothing from anyone, and leaves no debt.
    """
    if not decode_s:
        return 0.0
    earned = decode_s * share / (1 - share)
    return min(credit_s + earned - prefill_s, earned)
