"""What a decoder cannot be is refused by name; the rest is read as transformers reads it."""

from __future__ import annotations

from typing import Any

import pytest

from model.pretrained.settings import configure
from model.pretrained.source import PretrainedError
from tests.model.pretrained.folders import SETTINGS

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mixtral", "num_local_experts": 8},
            "num_local_experts is 8: .* mixture of",
        ),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "num_experts is 128: .* mixture of"),
        ({"model_type": "bloom"}, "model_type is 'bloom'; supported are llama, mistral, qwen2"),
        ({"model_type": None}, "model_type is None; supported are"),
        ({"alibi": True}, "alibi is set: llama has ALiBi positions, which is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set: .* a quantised check"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'; supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope'; supported are de"),
        ({"rope_scaling": 7}, "rope_scaling is 7: it must be a table"),
        ({"rope_scaling": LLAMA3 | {"factor": 0}}, "factor of the rotary positions is 0: it must"),
        ({"rope_theta": float("nan")}, "rope_theta of the rotary positions is nan"),
        ({"partial_rotary_factor": 1.5}, "12 channels of 8 turn"),
        ({"head_dim": 12}, "a head has 12 channels: the decode kernel takes multiples of 8"),
        ({"hidden_size": 17}, "a width of 17 has no 2 equal heads"),
        ({"num_key_value_heads": 3}, "kv_heads is 3: 2 heads cannot share them evenly"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'; supported are silu"),
        ({"vocab_size": None}, "the settings of the model lack vocab_size"),
        ({"vocab_size": 2**40}, "vocab_size is 1099511627776: it must be from 1 to 16,777,216"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1: it must be from 1 to"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2': it must be from 1 to"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small': it must be a number"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4}
            | {"layer_types": ["chunked_attention"] * 2},
            "layer_types has 'chunked_attention', which is not supported",
        ),
        (
            {"model_type": "smollm3", "no_rope_layers": [1]},
            "no_rope_layers has 1 entries for 2 layers",
        ),
        (
            {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is set: gpt2 has attention scaled by layer",
        ),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights is false"),
    ],
)
def test_names_what_is_not_supported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PretrainedError, match=message):
        configure({**SETTINGS, **changes})


def windows(**changes: Any) -> tuple[int, ...]:
    return configure({**SETTINGS, "num_hidden_layers": 4, **changes}).architecture.windows


def test_windows_are_those_of_the_layers() -> None:
    assert windows(model_type="mistral", sliding_window=5) == (5, 5, 5, 5)
    assert windows(model_type="mistral", sliding_window=None) == ()
    qwen: dict[str, Any] = {"model_type": "qwen2", "sliding_window": 5, "max_window_layers": 3}
    assert windows(**qwen) == ()
    assert windows(**qwen, use_sliding_window=True) == (0, 0, 0, 5)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert windows(**qwen, use_sliding_window=True, layer_types=kinds) == (5, 0, 5, 0)
    assert windows(model_type="llama", sliding_window=5) == ()


def test_old_and_new_words_for_rope_are_the_same() -> None:
    new = configure({**SETTINGS, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}})
    old = configure({**SETTINGS, "rope_theta": 5e5, "rope_scaling": LLAMA3})
    assert new == old
    assert new != configure({**SETTINGS, "rope_theta": 5e5})


def test_factors_divide_the_frequencies() -> None:
    plain, divided = configure(SETTINGS), configure(SETTINGS, divisors=(1.0, 2.0, 4.0, 8.0))
    ropes = [config.architecture.rope for config in (plain, divided)]
    assert ropes[0] is not None and ropes[1] is not None
    pairs = zip(ropes[0].frequencies, ropes[1].frequencies, strict=True)
    assert [a / b for a, b in pairs] == [1, 2, 4, 8]
    with pytest.raises(PretrainedError, match="there are 3 rope factors for 4 pairs"):
        configure(SETTINGS, divisors=(1.0, 2.0, 4.0))
