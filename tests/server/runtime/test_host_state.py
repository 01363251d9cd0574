from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from server.bundles.state import StateKind, StateTensor
from server.runtime.host_state import EMPTY, HostRows, StateLength


class Sums:
    """A fold graph of one stack, which adds up the entries. It notes how many rows it is given."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="keys")]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="next.keys")]

    def run(self, names: None, feeds: dict[str, Any]) -> list[Any]:
        self.batches.append(len(feeds["keys"]))
        return [feeds["keys"].sum(axis=2, keepdims=True)]


@pytest.mark.parametrize("folded_bytes", [1, 1 << 20])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_folds_take_an_even_number_of_rows(
    size: int, folded_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products in them sum the last of an odd number of rows in another order."""
    monkeypatch.setattr("server.runtime.host_state.FOLDED_BYTES", folded_bytes)
    rows = HostRows([StateTensor("keys", StateKind.STACK, (1, 4, 2), np.float32, 0.0)], 6)
    before = np.random.default_rng(0).integers(9, size=rows.buffers["keys"].shape)
    rows.buffers["keys"][...] = before
    session, folded = Sums(), [5, 0, 3, 1, 4][:size]
    rows.fold(session, folded, [EMPTY] * size, [StateLength(3, 3)] * size)
    assert all(batch % 2 == 0 for batch in session.batches)
    assert sum(session.batches) == size + size % 2
    before[folded, :, 0] = before[folded, :, :3].sum(axis=2)
    assert np.array_equal(rows.buffers["keys"], before)
