"""Norms by hand."""

from __future__ import annotations

import torch
from torch import nn

from model.layers.architecture import OURS, Architecture
from model.layers.norm import RmsNorm, make_norm


def test_the_root_mean_square_by_hand() -> None:
    norm = RmsNorm(2, 1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -1.0]))
    expected = torch.tensor([2 * 3, -4]) / (12.5 + 1e-6) ** 0.5
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), expected)


def test_epsilon_is_that_of_the_architecture() -> None:
    for kind in (RmsNorm(4, 0.3), make_norm(Architecture(norm="rms", epsilon=0.3), 4)):
        small = torch.full((4,), 1e-3)
        torch.testing.assert_close(kind(small), small / (0.3 + 1e-6) ** 0.5)
    norm = make_norm(OURS, 4)
    assert isinstance(norm, nn.LayerNorm) and norm.eps == 1e-5
