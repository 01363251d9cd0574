"""Activations by hand."""

from __future__ import annotations

import math

import pytest
import torch

from model.layers.architecture import Activation
from model.layers.mlp import ACTIVATIONS, activate

AT_MINUS_ONE_AND_TWO: dict[Activation, tuple[float, float]] = {
    "squared-relu": (0.0, 4.0),
    "relu": (0.0, 2.0),
    "silu": (-1 / (1 + math.e), 2 / (1 + math.exp(-2))),
    "gelu": (-0.5 * (1 + math.erf(-(0.5**0.5))), 1 + math.erf(2 * 0.5**0.5)),
    "gelu-tanh": (-0.15880801, 1.95459769),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_by_hand(activation: Activation) -> None:
    got = activate(torch.tensor([-1.0, 2.0]), activation, gated=False)
    torch.testing.assert_close(got, torch.tensor(AT_MINUS_ONE_AND_TWO[activation]))


def test_the_first_half_is_the_gate() -> None:
    got = activate(torch.tensor([-1.0, 2.0, 5.0, 7.0]), "relu", gated=True)
    assert torch.equal(got, torch.tensor([0.0, 14.0]))
