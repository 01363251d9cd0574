"""A tiny bundle of every pattern that can be served. Most patterns run only in slow tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.patterns import PATTERNS
from tests.checkpoints import FOLDED, export_tiny

SERVED = [
    *sorted(PATTERNS.keys() - {"fixed-bidirectional"}),
    *("fixed:mean", "fixed:deepset-max", *FOLDED),
]
FAST = ("fixed", "full", "logsparse", "mixture", "folded:fitted")
"""Together they have all kinds of state: folded by block, by carry, or never."""


def marked(patterns: list[str]) -> list[object]:
    """Test parameters; all but the fast patterns are marked slow."""
    return [p if p in FAST else pytest.param(p, marks=pytest.mark.slow) for p in patterns]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Uses one thread, since models this small are slower with more."""
    torch.set_num_threads(1)


@pytest.fixture(params=marked(SERVED))
def bundle(request: pytest.FixtureRequest, tiny_bundles: Path) -> Path:
    """Folder of a bundle of each pattern: 32 tokens in four blocks, two layers."""
    return export_tiny(tiny_bundles, request.param)
