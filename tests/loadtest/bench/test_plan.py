"""Cells, spans, and what a contestant would need."""

from __future__ import annotations

import pytest

from loadtest.bench.plan import (
    CONTESTANTS,
    CONTEXTS,
    ROOM,
    Cell,
    Contestant,
    Plan,
    Shape,
    all_cells,
    cache_bytes,
    needed_bytes,
    quick_cells,
    rounds_of,
    span_of,
    takes_part,
    tokens_label,
)

NAMED = {contestant.name: contestant for contestant in CONTESTANTS}


def test_every_context_meets_every_number_of_streams_cheapest_first() -> None:
    cells = all_cells((1024, 256), (8, 1))
    assert cells == (Cell(256, 1), Cell(256, 8), Cell(1024, 1), Cell(1024, 8))
    assert quick_cells() == (Cell(16_384, 8),)


@pytest.mark.parametrize(
    ("context", "span"), [(256, 16), (1024, 32), (4096, 64), (16_384, 128), (65_536, 256)]
)
def test_the_span_is_near_the_square_root(context: int, span: int) -> None:
    assert span_of(NAMED["fixed"], context) == span
    assert ROOM % span == 0, "a window would end inside a block"


def test_a_span_may_be_fixed_and_full_attention_has_none() -> None:
    assert span_of(NAMED["fixed-256"], 1024) == 256
    assert span_of(NAMED["full"], 1024) is None
    assert [c for c in CONTEXTS if takes_part(NAMED["fixed-256"], c)] == [1024]
    assert all(takes_part(NAMED["full"], c) for c in CONTEXTS)


def test_state_at_64k_is_a_hundredth_of_that_of_full_attention() -> None:
    full = cache_bytes(Shape(), NAMED["full"], 65_536)
    assert full == 2 * 8 * 512 * 4 * (65_536 + ROOM)
    fixed = cache_bytes(Shape(), NAMED["fixed"], 65_536)
    assert fixed == 2 * 8 * 512 * 4 * (258 - 1 + 256) + 8 * 512 * 4
    assert full / fixed > 100
    assert cache_bytes(Shape(), NAMED["llama-q8_0"], 65_536) == full // 2


def test_memory_grows_with_streams_and_counts_the_rows_that_ours_holds_besides() -> None:
    def per_stream(contestant: Contestant) -> int:
        few, many = (needed_bytes(Shape(), contestant, Cell(4096, n)) for n in (1, 2))
        return many - few

    one = cache_bytes(Shape(), NAMED["full"], 4096)
    assert per_stream(NAMED["full"]) == per_stream(NAMED["transformers"]) == one
    ours, theirs = (
        needed_bytes(Shape(), NAMED[name], Cell(4096, 1)) for name in ("full", "transformers")
    )
    assert ours - theirs == one


def test_a_llama_has_no_more_weights_than_ours_and_rows_that_can_be_quantised() -> None:
    shape = Shape()
    assert shape.gated_mlp % 32 == 0
    assert 0.95 * 2 * shape.mlp < 3 * shape.gated_mlp <= 2 * shape.mlp


def test_a_long_context_that_must_be_computed_is_measured_once() -> None:
    plan = Plan(quick_cells(), rounds=3)
    assert rounds_of(plan, NAMED["genai"], Cell(16_384, 8)) == 1
    assert rounds_of(plan, NAMED["genai"], Cell(256, 8)) == 3
    assert rounds_of(plan, NAMED["full"], Cell(16_384, 8)) == 3


@pytest.mark.parametrize(("tokens", "label"), [(256, "256"), (1024, "1k"), (1500, "1500")])
def test_labels(tokens: int, label: str) -> None:
    assert tokens_label(tokens) == label
