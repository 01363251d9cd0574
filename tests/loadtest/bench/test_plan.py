"""Cells, spans, who takes part, and what fits into memory."""

from __future__ import annotations

import pytest

from loadtest.bench.contestants import CONTESTANTS, INSTALL
from loadtest.bench.plan import (
    CELLS,
    CHECK,
    FIRST_TOKEN,
    QUICK_CELLS,
    ROOM,
    Cell,
    Contestant,
    Plan,
    Shape,
    cache_bytes,
    entrants,
    expected_s,
    fits,
    is_check,
    needed_bytes,
    pack,
    parse_cell,
    span_of,
    tokens_label,
)
from loadtest.bench.worker import ADAPTERS, PACKAGES

NAMED = {contestant.name: contestant for contestant in CONTESTANTS}
PLAN = Plan((*CELLS, FIRST_TOKEN), CONTESTANTS)


def names(cell: Cell, plan: Plan = PLAN) -> set[str]:
    return {contestant.name for contestant in entrants(plan, cell)}


def test_every_contestant_has_an_adapter_and_every_peer_a_remedy() -> None:
    assert {contestant.adapter for contestant in CONTESTANTS} == set(ADAPTERS) == set(PACKAGES)
    assert set(INSTALL) == set(ADAPTERS) - {"ours"}


@pytest.mark.parametrize(
    ("context", "span"), [(256, 16), (1024, 32), (4096, 64), (16_384, 128), (65_536, 256)]
)
def test_the_span_is_near_the_square_root(context: int, span: int) -> None:
    assert span_of(NAMED["fixed"], context) == span
    assert ROOM % span == 0, "a window would end inside a block"
    assert span_of(NAMED["fixed-1k"], context) == 256
    assert span_of(NAMED["full"], context) is None


def test_all_precisions_of_everybody_meet_in_a_cell() -> None:
    everybody = names(Cell(256, 1))
    assert {"fixed", "fixed-cache-float16", "fixed-int8", "fixed-int8-state8"} <= everybody
    assert {"genai", "genai-int4", "vllm-float32", "vllm-bfloat16", "transformers"} <= everybody
    assert {"llama-f32", "llama-q8_0", "llama-q4_0", "full"} <= everybody
    assert not everybody & {"fixed-steps", "fixed-1k", "genai-graph"}


def test_a_context_that_takes_hours_to_compute_is_made_up_and_held_against_the_engine() -> None:
    assert {"genai", "genai-int4"} <= names(CHECK)
    assert {"genai-graph", "genai-int4-graph"} <= names(CHECK)
    assert is_check(NAMED["genai-graph"], CHECK)
    for cell in (Cell(16_384, 8), Cell(65_536, 8)):
        assert {"genai-graph", "genai-int4-graph"} <= names(cell)
        assert not {"genai", "genai-int4"} & names(cell)
        assert not is_check(NAMED["genai-graph"], cell)


def test_a_part_is_measured_where_it_belongs_or_where_it_is_asked_for() -> None:
    assert "fixed-1k" in names(Cell(65_536, 8))
    asked = Plan((Cell(256, 1),), (NAMED["fixed-steps"],), asked_for=True)
    assert names(Cell(256, 1), asked) == {"fixed-steps"}


def test_the_first_token_is_timed_of_whole_engines() -> None:
    assert {"fixed", "genai", "vllm-bfloat16"} <= names(FIRST_TOKEN)
    assert not names(FIRST_TOKEN) & {"fixed-steps", "fixed-1k", "genai-graph"}
    assert (PLAN.rounds_of(FIRST_TOKEN), PLAN.rounds_of(CHECK)) == (3, 9)


def test_state_at_64k_is_a_hundredth_of_that_of_full_attention() -> None:
    full = cache_bytes(Shape(), NAMED["full"], 65_536)
    assert full == 2 * 8 * 512 * 4 * (65_536 + ROOM)
    fixed = cache_bytes(Shape(), NAMED["fixed"], 65_536)
    assert fixed == 2 * 8 * 512 * 4 * (258 - 1 + 256) + 8 * 512 * 4
    assert full / fixed > 100
    assert cache_bytes(Shape(), NAMED["llama-q8_0"], 65_536) == full // 2
    assert cache_bytes(Shape(), NAMED["vllm-bfloat16"], 65_536) == full // 2


def test_what_decodes_at_a_context_of_its_own_holds_state_for_that() -> None:
    at_1k = cache_bytes(Shape(), NAMED["fixed-1k"], 65_536)
    assert at_1k == 2 * 8 * 512 * 4 * (1536 // 256 - 1 + 256) + 8 * 512 * 4


def test_memory_grows_with_streams_and_counts_the_rows_that_ours_holds_besides() -> None:
    def per_stream(contestant: Contestant) -> int:
        few, many = (needed_bytes(Shape(), contestant, Cell(4096, n)) for n in (1, 2))
        return many - few

    one = cache_bytes(Shape(), NAMED["full"], 4096)
    assert per_stream(NAMED["full"]) == per_stream(NAMED["transformers"]) == one
    alone = (NAMED["full"].process_mib - NAMED["transformers"].process_mib) * 2**20
    ours, theirs = (
        needed_bytes(Shape(), NAMED[name], Cell(4096, 1)) for name in ("full", "transformers")
    )
    assert ours - theirs - alone == one
    int4, float32 = (
        needed_bytes(Shape(), NAMED[name], Cell(256, 1)) for name in ("genai-int4", "genai")
    )
    assert float32 - int4 == 2 * (Shape().matrix_bytes("float32") * 7 // 8)
    computed, made_up = (
        needed_bytes(Shape(), NAMED[name], Cell(4096, 8)) for name in ("genai", "genai-graph")
    )
    assert computed - made_up == 8 * 4096 * 12 * 512 * 4


def roomy(*together: str) -> Plan:
    """A plan with just enough memory for these contestants at once, at 64k x 8."""
    cell = Cell(65_536, 8)
    needed = sum(needed_bytes(Shape(), NAMED[name], cell) for name in together)
    return Plan((cell,), CONTESTANTS, memory_bytes=needed)


def test_contestants_that_fit_together_are_one_group() -> None:
    cell, chosen = Cell(65_536, 8), [NAMED["genai-graph"], NAMED["full"], NAMED["vllm-bfloat16"]]
    plan = roomy("genai-graph", "full", "vllm-bfloat16")
    assert fits(plan, cell, chosen)
    assert pack(plan, cell, chosen, []) == [chosen]


def test_where_memory_is_short_ours_stand_beside_one_peer_at_a_time() -> None:
    cell, ours = Cell(65_536, 8), [NAMED["fixed"], NAMED["fixed-int8"]]
    peers = [NAMED["genai-graph"], NAMED["llama-f32"], NAMED["llama-q8_0"], NAMED["llama-q4_0"]]
    plan = roomy("fixed", "fixed-int8", "llama-q8_0", "llama-q4_0")
    assert not fits(plan, cell, [*ours, *peers])
    found = pack(plan, cell, peers, ours)
    assert [[c.name for c in group] for group in found] == [
        ["fixed", "fixed-int8", "genai-graph"],
        ["fixed", "fixed-int8", "llama-f32"],
        ["fixed", "fixed-int8", "llama-q8_0", "llama-q4_0"],
    ]
    assert all(fits(plan, cell, group) for group in found)


def test_where_it_is_shorter_yet_our_best_alone_stands_beside_it() -> None:
    cell, ours = Cell(65_536, 8), [NAMED["fixed"], NAMED["fixed-int8"]]
    plan = roomy("fixed-int8", "genai-graph")
    assert pack(plan, cell, [NAMED["genai-graph"]], ours) == [[ours[1], NAMED["genai-graph"]]]


def test_a_long_cell_is_expected_to_take_longer() -> None:
    assert expected_s(PLAN, Cell(65_536, 8)) > 2 * expected_s(PLAN, Cell(256, 1))


def test_a_llama_has_no_more_weights_than_ours_and_rows_that_can_be_quantised() -> None:
    shape = Shape()
    assert shape.gated_mlp % 32 == 0
    assert 0.95 * 2 * shape.mlp < 3 * shape.gated_mlp <= 2 * shape.mlp


def test_cells_are_read_as_they_are_written() -> None:
    for cell in (*CELLS, *QUICK_CELLS):
        assert parse_cell(str(cell)) == cell
    assert parse_cell("16384x8") == Cell(16_384, 8)
    assert str(FIRST_TOKEN) == "first token of 16k"
    for text in ("", "256", "x8", "0x1", "256x0", "kx2"):
        with pytest.raises(ValueError):
            parse_cell(text)


@pytest.mark.parametrize(("tokens", "label"), [(256, "256"), (1024, "1k"), (1500, "1500")])
def test_labels(tokens: int, label: str) -> None:
    assert tokens_label(tokens) == label
