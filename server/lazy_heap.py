"""A priority queue whose items can change their key and leave, in O(log n) amortised."""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class LazyHeap(Generic[T]):
    """Items by a number, the smallest first; among equal numbers, the one put first.

    An entry of the heap that counts no more stays until it comes to the top, or until there are
    more of them than others.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._entries: dict[T, tuple[float, int, T]] = {}  # those that count
        self._puts = count()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: T) -> bool:
        return item in self._entries

    @property
    def first(self) -> T:
        """The item of the smallest number. Raises IndexError if there is none."""
        return self._heap[0][2]

    @property
    def first_key(self) -> float:
        """The smallest number; infinite if there is none."""
        return self._heap[0][0] if self._heap else float("inf")

    def put(self, item: T, key: float) -> None:
        """Add an item, or change its number."""
        entry = (key, next(self._puts), item)
        self._entries[item] = entry
        heappush(self._heap, entry)
        self._clean()

    def discard(self, item: T) -> None:
        """Remove an item. Does nothing if it is not there."""
        if self._entries.pop(item, None) is not None:
            self._clean()

    def pop(self) -> T:
        """Remove and return the first item. Raises IndexError if there is none."""
        item = self.first
        self.discard(item)
        return item

    def _clean(self) -> None:
        """Have an entry that counts at the top, and no more others than such in the heap."""
        if len(self._heap) > 2 * len(self._entries):
            self._heap = list(self._entries.values())
            heapify(self._heap)
        while self._heap and self._entries.get(self._heap[0][2]) is not self._heap[0]:
            heappop(self._heap)
