"""What no layer can be built of is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from model.layers.architecture import Architecture


@pytest.mark.parametrize(
    ("built", "message"),
    [
        ({"norm": "batch"}, "norm must be one of layer, rms; got 'batch'"),
        ({"activation": "swish"}, "activation must be one of squared-relu, .*; got 'swish'"),
        ({"biases": ("qkv", "gate")}, "biases must be of qkv, out, mlp, head; got 'gate'"),
        ({"epsilon": 0.0}, "epsilon must be above 0 and below 1, got 0.0"),
        ({"kv_heads": 0}, "kv_heads must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"windows": (4, -1)}, "windows must be 0 or more, got -1"),
    ],
)
def test_names_the_value_and_the_choices(built: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Architecture(**built)
