from __future__ import annotations

import weakref

from hypothesis import given
from hypothesis import strategies as st

from server.lazy_heap import LazyHeap

_ITEMS = st.integers(0, 7)
_STEPS = st.one_of(
    st.tuples(st.just("put"), _ITEMS, st.integers(0, 5)),
    st.tuples(st.just("discard"), _ITEMS, st.just(0)),
    st.tuples(st.just("pop"), st.just(0), st.just(0)),
)


@given(st.lists(_STEPS, max_size=200))
def test_it_is_like_a_list_that_is_sorted_anew(steps: list[tuple[str, int, int]]) -> None:
    heap, plain = LazyHeap[int](), dict[int, tuple[int, int]]()
    for number, (what, item, key) in enumerate(steps):
        if what == "put":
            heap.put(item, key)
            plain[item] = (key, number)
        elif what == "discard":
            heap.discard(item)
            plain.pop(item, None)
        elif plain:
            first = min(plain, key=plain.__getitem__)
            assert heap.pop() == first
            del plain[first]
        assert len(heap) == len(plain)
        assert all((item in heap) == (item in plain) for item in range(8))
        assert heap.first_key == min((key for key, _ in plain.values()), default=float("inf"))
        if plain:
            assert heap.first == min(plain, key=plain.__getitem__)


class _Key(float):
    """A number whose life can be watched."""


def test_what_counts_no_more_takes_no_memory() -> None:
    heap, keys = LazyHeap[int](), []
    for number in range(1_000):
        key = _Key(number)
        keys.append(weakref.ref(key))
        heap.put(number % 3, key)
        del key
        assert sum(each() is not None for each in keys[-20:]) <= 6
    assert sum(each() is not None for each in keys) <= 6
    for item in range(3):
        heap.discard(item)
    assert not any(each() for each in keys)
