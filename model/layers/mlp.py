"""What the MLP of a layer does between its two matrices."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from model.layers.architecture import Activation


def _squared_relu(x: Tensor) -> Tensor:
    positive = F.relu(x)
    return positive * positive


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "squared-relu": _squared_relu,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu-tanh": _gelu_tanh,
}


def activate(hidden: Tensor, activation: Activation, gated: bool) -> Tensor:
    """The activation of `hidden[..., mlp]`; if `gated`, that of `[..., 2 * mlp]`, gates first."""
    function = ACTIVATIONS[activation]
    if not gated:
        return function(hidden)
    gate, value = hidden.chunk(2, dim=-1)
    return function(gate) * value
