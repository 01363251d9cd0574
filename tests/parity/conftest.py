"""Every pattern that can be served, as a tiny bundle. Most of them only among the slow tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.patterns import PATTERNS
from tests.checkpoints import export_tiny

SERVED = [*sorted(PATTERNS.keys() - {"fixed-bidirectional"}), "fixed:mean", "fixed:deepset-max"]
FAST = ("fixed", "full", "logsparse", "mixture")
"""Between them all kinds of state, folded and not, by block and by carry."""


def marked(patterns: list[str]) -> list[object]:
    """Parameters, of which all but the fast ones are marked slow."""
    return [p if p in FAST else pytest.param(p, marks=pytest.mark.slow) for p in patterns]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small lose more to threads waiting for each other than they win."""
    torch.set_num_threads(1)


@pytest.fixture(params=marked(SERVED))
def bundle(request: pytest.FixtureRequest, tiny_bundles: Path) -> Path:
    """Folder of a bundle of each pattern: 32 tokens in four blocks, two layers."""
    return export_tiny(tiny_bundles, request.param)
