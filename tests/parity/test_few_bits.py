"""Few bits in matrices or caches: a stream gets the same logits to the bit, however it is computed.

Their kernels round, so a difference in the last bit of a sum would not stay one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from server.arrays import Floats, Ints
from server.engine.kv_cache import num_rows, prefill_row
from tests.checkpoints import NARROWED, export_tiny, in_few_bits, quantise_tiny
from tests.parity.conftest import FAST, SERVED
from tests.parity.served import Served, draw_tokens

SPAN, LARGEST = 8, 33
slow = pytest.mark.slow


def cases() -> Iterator[object]:
    """Every pattern with every type of matrices and caches that it can have; most of them slow."""
    for pattern in SERVED:
        for kind in ("int8", "int4", "state8", "int8-state8"):
            if "state8" in kind and pattern not in NARROWED:
                continue
            is_fast = pattern in FAST and kind in ("int8", "state8")
            yield pytest.param(
                (pattern, kind), id=f"{pattern}-{kind}", marks=() if is_fast else slow
            )


@pytest.fixture(params=cases())
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A pattern, and what has few bits."""
    pattern, kind = request.param
    return pattern, kind


@pytest.fixture
def plain(case: tuple[str, str], tiny_bundles: Path) -> Path:
    """Folder of the same bundle as `few_bits`, as it is without."""
    return export_tiny(tiny_bundles, case[0])


@pytest.fixture
def few_bits(case: tuple[str, str], plain: Path) -> Path:
    """Folder of a bundle with matrices of 8 or 4 bits, with caches in int8, or with both."""
    return in_few_bits(plain, case[1])


@pytest.fixture
def tokens(few_bits: Path) -> Ints:
    return draw_tokens(few_bits, LARGEST + 1)


def together(folder: Path, tokens: Ints, threads: int = 1) -> Floats:
    """The logits of all `tokens[B, T]`, stepped in one batch that takes all slots."""
    served = Served(folder, len(tokens), threads=threads)
    for _ in tokens:
        served.cache.begin()
    return served.decode(tokens)


def prompted(served: Served, prompt: Ints, limit: int) -> Floats:
    """The logits of a prompt, in passes as the engine makes them."""
    served.cache.start_prefill(prompt)
    served.prefilling = True
    served.poison()
    parts = []
    while (at := served.cache.prefill_pushed) < len(prompt):
        part = prompt[at : at + served.cache.prefill_room(limit)]
        parts.append(served.cache.prefill(part, logits=True).copy())
        served.poison()
    return np.concatenate(parts)


@pytest.mark.parametrize(
    "size", [1, 2, 3, 8, *(pytest.param(n, marks=slow) for n in (5, 9, 17, 31, 32, 33))]
)
def test_the_size_of_the_batch_changes_no_bit(few_bits: Path, tokens: Ints, size: int) -> None:
    expected = together(few_bits, tokens)
    assert np.isfinite(expected).all()
    for first in range(0, len(tokens) - size + 1, max(size, 8)):
        part = slice(first, first + size)
        assert np.array_equal(together(few_bits, tokens[part]), expected[part])


@pytest.mark.parametrize("threads", [2, pytest.param(3, marks=slow)])
def test_the_number_of_threads_changes_no_bit(few_bits: Path, tokens: Ints, threads: int) -> None:
    for size in (3, 4):
        got = together(few_bits, tokens[:size], threads)
        assert np.array_equal(got, together(few_bits, tokens[:size]))


@pytest.mark.parametrize("length", [1, SPAN - 1, 2 * SPAN + 3, 30])
def test_the_chunks_of_a_prompt_change_no_bit(few_bits: Path, tokens: Ints, length: int) -> None:
    prompt = tokens[0, :length]
    expected: Floats | None = None
    for limit in (1, 2, 3, 4, 5, SPAN - 1, SPAN, 100):
        served = Served(few_bits)
        got = prompted(served, prompt, limit)
        served.join()
        got = np.concatenate((got, served.step(tokens[0, length : length + 1])))
        expected = got if expected is None else expected
        assert np.array_equal(got, expected), limit


def test_a_prompt_without_logits_leaves_the_same_state(few_bits: Path, tokens: Ints) -> None:
    states = []
    for logits in (True, False):
        served = Served(few_bits)
        served.start_prefill()
        while (at := served.cache.prefill_pushed) < 15:
            part = tokens[0, at : min(15, at + served.cache.prefill_room(4))]
            assert len(served.cache.prefill(part, logits)) == (len(part) if logits else 0)
        states.append(served.state(served.join()))
    for name, values in states[0].items():
        assert np.array_equal(values, states[1][name])


def test_a_state_takes_the_bytes_that_the_manifest_says(few_bits: Path, tokens: Ints) -> None:
    served = Served(few_bits, slots=1)
    served.cache.begin()
    for pushed, token in enumerate(tokens[0], start=1):
        served.step(np.array([token]))
        taken = sum(values.nbytes for values in served.state(0).values())
        assert taken == sum(served.bundle.state_bytes(pushed).values())
        assert taken <= served.bundle.peak_state_bytes(pushed)


def test_cached_blocks_change_no_bit(few_bits: Path, tokens: Ints) -> None:
    tokens[1, : 2 * SPAN + 3] = tokens[0, : 2 * SPAN + 3]
    served = Served(few_bits, prefix_bytes=10**6)
    prompted(served, tokens[0, :30], SPAN)
    got = prompted(served, tokens[1, :30], 3)
    assert len(got) == (30 - 2 * SPAN if served.bundle.shares_blocks else 30)
    assert np.array_equal(got, prompted(Served(few_bits), tokens[1, :30], SPAN)[-len(got) :])


def test_what_was_pushed_one_by_one_is_no_block_of_another_prompt(
    few_bits: Path, tokens: Ints
) -> None:
    """A stream that continues has tokens in its state that a prompt would push together."""
    for prompt in tokens[:8, :31]:
        served = Served(few_bits, slots=1, prefix_bytes=10**6)
        served.cache.begin()
        served.decode(prompt[None, : SPAN - 2])
        served.cache.resume_prefill(prompt, served.cache.save(0))
        served.prefilling = True
        while (at := served.cache.prefill_pushed) < len(prompt):
            served.cache.prefill(prompt[at : at + served.cache.prefill_room(SPAN)])
        assert not (served.bundle.pairs_rows and served.cache.prefix_bytes)
        got = prompted(served, prompt, SPAN)
        expected = prompted(Served(few_bits, slots=1), prompt, SPAN)
        assert np.array_equal(got, expected[-len(got) :])


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_full_batch_and_the_prefill_slot_leave_each_other_alone(
    few_bits: Path, tokens: Ints, slots: int
) -> None:
    """An odd batch and an odd chunk take one row more."""
    stepped = together(few_bits, tokens[:slots])
    prompt = tokens[slots, :29]
    expected = prompted(Served(few_bits), prompt, 3)
    served = Served(few_bits, slots)
    for _ in range(slots):
        served.cache.begin()
    served.start_prefill()
    for at in range(30):
        got = served.step(tokens[:slots, at])
        assert np.array_equal(got, stepped[:, at])
        if (pushed := served.cache.prefill_pushed) < len(prompt):
            part = prompt[pushed : pushed + served.cache.prefill_room(2)]
            out = served.cache.prefill(part, logits=True)
            assert np.array_equal(out, expected[pushed : pushed + len(part)])


def test_a_parked_stream_continues_to_the_bit_in_other_company(
    few_bits: Path, tokens: Ints
) -> None:
    expected = together(few_bits, tokens[:6])
    for parked_at in (5, SPAN, 2 * SPAN + 3):
        first = Served(few_bits)
        for _ in range(2):
            first.cache.begin()
        first.decode(tokens[:2, :parked_at])
        saved = [first.cache.save(row) for row in (1, 0)]
        for others in (0, 1, 2):
            second = Served(few_bits, 5)
            for state in saved:
                second.cache.restore(state)
            rows = [1, 0, *range(2, 2 + others)]
            for _ in range(others):
                second.cache.begin()
            for at in range(parked_at, 30):
                behind = [at, at, *[at - parked_at] * others]
                got = second.step(tokens[rows, behind])
                assert np.array_equal(got, expected[rows, behind])


def test_rows_come_in_pairs_only_where_it_matters(few_bits: Path, plain: Path) -> None:
    few, other = Served(few_bits), Served(plain)
    assert few.bundle.pairs_rows == (
        "-int" in few_bits.name
        or few.bundle.manifest.attention.endswith((":mean", ":tangent", ":fitted"))
    )
    if not few.bundle.pairs_rows:
        other, few = few, Served(quantise_tiny(plain, 8))
    rows = [(prefill_row(few.bundle, n), num_rows(few.bundle, n)) for n in (1, 2, 3)]
    assert rows == [(2, 4), (2, 4), (4, 6)]
    rows = [(prefill_row(other.bundle, n), num_rows(other.bundle, n)) for n in (1, 2)]
    assert rows == [(1, 2), (2, 3)]
    for served in (few, other):
        served.start_prefill()
    block = few.cache.block_room
    for limit, pairs in {1: 2, 2: 2, 3: 2, 4: 4, 7: 6, 8: 8}.items():
        assert few.cache.prefill_room(limit) == (block if few.bundle.span else pairs)
        assert other.cache.prefill_room(limit) == min(limit, block)
    assert few.cache.prefill_room(99) == other.cache.prefill_room(99) == block
    assert few.prefill(draw_tokens(few_bits, 1)[0, :3]).shape[0] == 3
    assert few.cache.prefill_room(1) == (few.cache.block_room if few.bundle.span else 2)
