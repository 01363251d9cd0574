"""Long streams of every pattern, on the served path, equal the parallel float64 forward."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import export_tiny
from tests.parity.conftest import SERVED
from tests.parity.served import Served, assert_parity, draw_tokens, expected_logits

CONTEXT, SPAN, LAST = 4608, 16, 40


@pytest.mark.slow
@pytest.mark.parametrize("pattern", SERVED)
def test_three_long_streams_that_end_in_one_batch(pattern: str, tiny_bundles: Path) -> None:
    bundle = export_tiny(tiny_bundles, pattern, CONTEXT, SPAN)
    tokens = draw_tokens(bundle, 3)
    expected = expected_logits(bundle, tokens)
    begun = np.random.default_rng(SERVED.index(pattern)).integers(4096, CONTEXT - LAST, size=3)
    served = Served(bundle)
    for row, length in enumerate(begun):
        served.start_prefill()
        assert_parity(served.prefill(tokens[row, :length]), expected[row, :length])
        served.join()
    for step in range(LAST):
        at = begun + step
        assert_parity(served.step(tokens[range(3), at]), expected[range(3), at])
