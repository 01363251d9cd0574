"""Rotary positions, by complex numbers."""

from __future__ import annotations

import torch

from model.layers.architecture import Rope
from model.layers.positions import RotaryPositions, turn

ROPE = Rope((1.0, 0.25, 0.0625), scale=1.5)


def test_pairs_turn_as_complex_numbers_and_the_rest_stays() -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 90, 3, 1, 0]])
    got = RotaryPositions(ROPE).turn_at(positions)(x)
    angles = positions[:, :, None, None] * torch.tensor(ROPE.frequencies, dtype=torch.float64)
    pairs = torch.complex(x[..., :3], x[..., 3:6]) * torch.polar(torch.tensor(1.5).double(), angles)
    expected = torch.cat((pairs.real, pairs.imag, x[..., 6:]), dim=-1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert got.dtype == torch.float64


def test_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 6, dtype=torch.float64)
    rotary = RotaryPositions(ROPE).double()

    def product(one: int, other: int) -> torch.Tensor:
        turned = [rotary.turn_at(torch.tensor([[at]]))(x) for at, x in ((one, q), (other, k))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(9, 4), product(105, 100), rtol=0, atol=1e-4)
    assert (product(9, 4) - product(9, 5)).abs() > 1e-3


def test_angles_are_float32_products_in_any_type() -> None:
    rope = Rope((0.7300000190734863,))
    position = torch.tensor([[100_001]])
    single, double = (RotaryPositions(rope).to(kind)(position) for kind in (None, torch.float64))
    assert single[0].dtype == double[0].dtype == torch.float32
    assert torch.equal(single[0], double[0]) and torch.equal(single[1], double[1])
    angle = torch.tensor(100_001.0) * torch.tensor(0.73)
    assert torch.equal(single[0][0, 0, 0], angle.cos())


def test_a_turn_by_nothing_is_the_scale() -> None:
    x = torch.randn(1, 2, 1, 4)
    ones, zeros = torch.full((1, 2, 2), 2.0), torch.zeros(1, 2, 2)
    assert torch.equal(turn(x, ones, zeros), 2 * x)
