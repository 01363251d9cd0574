"""Normalisation of vectors by their root mean square."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.layers.architecture import Architecture


class RmsNorm(nn.Module):
    """Divides the last axis by its root mean square, without a mean taken off, and weighs it."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Vectors `[..., width]` to vectors of the same shape."""
        # In these very steps onnxruntime finds the norm, and computes it in one kernel.
        size = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)
        normed: Tensor = x / size * self.weight
        return normed


def make_norm(built: Architecture, width: int) -> nn.Module:
    """The norm that an architecture has."""
    if built.norm == "rms":
        return RmsNorm(width, built.epsilon)
    return nn.LayerNorm(width, eps=built.epsilon)
