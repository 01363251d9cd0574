"""The bundles of this repository, served over their context, equal the forward of their weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.parity.served import Served, assert_parity, draw_tokens, expected_logits

BUNDLES = sorted(path.parent for path in Path(__file__).parents[2].glob("bundles/*/manifest.json"))


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda folder: folder.name)
def test_a_stream_as_long_as_the_context(bundle: Path) -> None:
    tokens = draw_tokens(bundle, 1)
    expected = expected_logits(bundle, tokens)
    served = Served(bundle, slots=1)
    steps = 2 * (served.bundle.span or 16) + 2  # the end of the context, by single tokens
    served.start_prefill()
    first = served.prefill(tokens[0, :-steps])
    served.join()
    got = np.concatenate((first, served.decode(tokens[:, -steps:])[0]))
    assert_parity(got, expected[0])
    assert served.cache.pushed.tolist() == [served.bundle.context]


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda folder: folder.name)
def test_graphs_hold_nothing_of_the_exporting_machine(bundle: Path) -> None:
    for path in bundle.iterdir():
        assert b".py" not in path.read_bytes(), f"{path} holds stack traces: export it again"
