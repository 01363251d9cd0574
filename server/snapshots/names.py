"""Names of what is stored of a stream, and what they tell of its owner.

A stream changes its owner now and then, and each owner has an epoch. It claims the stream by
creating the origin of its epoch. What earlier owners still write is not read. A tombstone is above
all epochs: the stream is deleted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

TOMBSTONE = "deleted"
_NAME = re.compile(r"(\d{8,19})-(origin|\d{1,5})")


@dataclass(frozen=True)
class Claim:
    """Who owns a stream: the owner of this epoch, or nobody any more."""

    epoch: int
    deleted: bool = False

    def is_above(self, epoch: int) -> bool:
        """Whether the owner of that epoch has lost the stream."""
        return self.deleted or self.epoch > epoch


def origin_name(epoch: int) -> str:
    """The claim: what the owner of an epoch goes on behind."""
    return f"{epoch:08d}-origin"


def output_name(epoch: int, output: int) -> str:
    """The latest snapshot of an output in an epoch."""
    return f"{epoch:08d}-{output}"


def claim_in(names: Iterable[str]) -> Claim | None:
    """The highest claim; None where nobody has claimed anything."""
    names = set(names)
    origins = [epoch for epoch in map(_epoch, names) if origin_name(epoch) in names]
    if not origins and TOMBSTONE not in names:
        return None
    return Claim(max(origins, default=0), TOMBSTONE in names)


def of_epoch(names: Iterable[str], epoch: int) -> list[str]:
    """Those of an epoch, in order, its origin first."""
    found = (name for name in names if _epoch(name) == epoch)
    return sorted(found, key=lambda name: (name != origin_name(epoch), name))


def before_epoch(names: Iterable[str], epoch: int) -> list[str]:
    """Those of earlier epochs."""
    return [name for name in names if 0 <= _epoch(name) < epoch]


def _epoch(name: str) -> int:
    """The epoch of what has that name; -1 for what has none."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else -1
