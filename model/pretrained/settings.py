"""From the settings of a pretrained model to the config of a decoder.

What a decoder cannot be is refused by name, and never approximated.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from concertina.shown import cut, shown
from model.config import ModelConfig
from model.layers.architecture import Activation, Architecture, Biased
from model.pretrained.rope import make_rope
from model.pretrained.source import PretrainedError, Settings

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
FAMILIES = (*LLAMA_LIKE, "gpt2", "gpt_neox")
"""The values of `model_type` that are supported."""

_SPAN = 8
"""Full attention has no blocks; the checks of an export take their lengths from this."""
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu-tanh",
    "gelu_fast": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "relu": "relu",
    "relu2": "squared-relu",
}
_REFUSED = {
    "alibi": "ALiBi positions",
    "quantization_config": "a quantised checkpoint; convert the one that it was made of",
    "add_cross_attention": "cross-attention",
    "scale_attn_by_inverse_layer_idx": "attention scaled by layer",
}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_LARGEST, _MOST_LAYERS, _WIDEST_HEAD = 2**24, 4096, 65_536
"""No size of a model is above these; a larger one is a mistake or an attack."""


def configure(settings: Settings, divisors: Sequence[float] = ()) -> ModelConfig:
    """The decoder that `settings` describe. Raises PretrainedError if there is none.

    divisors: see `make_rope`.
    """
    family = settings.get("model_type")
    named = cut(family, 80) if isinstance(family, str) else shown(family)
    for name in _EXPERTS:
        if isinstance(settings.get(name), int) and settings[name] > 1:
            raise PretrainedError(
                f"{name} is {shown(settings[name])}: {named} is a mixture of experts, and "
                "those are not supported"
            )
    for name, what in _REFUSED.items():
        if settings.get(name):
            raise PretrainedError(f"{name} is set: {named} has {what}, which is not supported")
    if family not in [*FAMILIES]:
        raise PretrainedError(
            f"model_type is {shown(family)}; supported are {', '.join(FAMILIES)}: this model "
            "cannot be converted"
        )
    make = {"gpt2": _gpt2, "gpt_neox": _gpt_neox}.get(family)
    try:
        return make(settings) if make else _llama(settings, divisors)
    except PretrainedError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = cut(str(error), 200)  # a setting of another type than all that are known
        raise PretrainedError(f"the settings of the model do not fit: {reason}") from None


def _llama(settings: Settings, divisors: Sequence[float]) -> ModelConfig:
    """Llama and its relatives: RMS norms, gated MLP, shared heads, rotary positions."""
    family = settings["model_type"]
    layers, heads = _layers(settings), _size(settings, "num_attention_heads")
    width = _size(settings, "hidden_size")
    dim = 128 if family == "qwen3" else None
    if dim is None and settings.get("head_dim") is None:
        dim = _head_dim(width, heads)
    dim = _size(settings, "head_dim", dim, largest=_WIDEST_HEAD)
    biases: tuple[Biased, ...] = ("qkv",) if family == "qwen2" else ()
    if settings.get("attention_bias") and family not in ("qwen2", "mistral"):
        biases = ("qkv", "out")
    if settings.get("mlp_bias") and family in ("llama", "smollm3"):
        biases = (*biases, "mlp")
    theta = 2e6 if family == "smollm3" else 1e4
    return _config(
        settings,
        width=width,
        layers=layers,
        heads=heads,
        mlp=_size(settings, "intermediate_size"),
        context=_size(settings, "max_position_embeddings"),
        positions="none",
        architecture=Architecture(
            kv_heads=_size(settings, "num_key_value_heads", heads),
            head_dim=dim,
            norm="rms",
            epsilon=_real(settings, "rms_norm_eps", 1e-6),
            activation=_activation(settings, "hidden_act", "silu"),
            gated=True,
            head_norms=family == "qwen3",
            biases=biases,
            tied=bool(settings.get("tie_word_embeddings", family == "smollm3")),
            rope=make_rope(settings, dim, base=theta, divisors=divisors),
            unturned=_unturned(settings, layers) if family == "smollm3" else (),
            windows=_windows(settings, layers),
        ),
    )


def _gpt2(settings: Settings) -> ModelConfig:
    """GPT-2: layer norms, learned positions, biases everywhere but at the head."""
    if not settings.get("scale_attn_weights", True):
        raise PretrainedError("scale_attn_weights is false: attention without it is not supported")
    width = _size(settings, "n_embd")
    return _config(
        settings,
        width=width,
        layers=_layers(settings, "n_layer"),
        heads=_size(settings, "n_head"),
        mlp=_size(settings, "n_inner", 4 * width),
        context=_size(settings, "n_positions"),
        positions="learned",
        architecture=Architecture(
            epsilon=_real(settings, "layer_norm_epsilon", 1e-5),
            activation=_activation(settings, "activation_function", "gelu_new"),
            biases=("qkv", "out", "mlp"),
            tied=bool(settings.get("tie_word_embeddings", True)),
        ),
    )


def _gpt_neox(settings: Settings) -> ModelConfig:
    """GPT-NeoX and Pythia: attention and MLP side by side, part of each head turns."""
    width, heads = _size(settings, "hidden_size"), _size(settings, "num_attention_heads")
    rope = make_rope(
        settings,
        _head_dim(width, heads),
        base=settings.get("rotary_emb_base", 10_000),
        share=settings.get("rotary_pct", 0.25),
    )
    attention: tuple[Biased, ...] = ("qkv", "out") if settings.get("attention_bias", True) else ()
    return _config(
        settings,
        width=width,
        layers=_layers(settings),
        heads=heads,
        mlp=_size(settings, "intermediate_size"),
        context=_size(settings, "max_position_embeddings"),
        positions="none",
        architecture=Architecture(
            epsilon=_real(settings, "layer_norm_eps", 1e-5),
            activation=_activation(settings, "hidden_act", "gelu"),
            parallel=bool(settings.get("use_parallel_residual", True)),
            biases=(*attention, "mlp"),
            tied=bool(settings.get("tie_word_embeddings", False)),
            rope=rope,
        ),
    )


def _config(settings: Settings, **fields: Any) -> ModelConfig:
    dim = fields["architecture"].head_dim or _head_dim(fields["width"], fields["heads"])
    if dim % 8:
        raise PretrainedError(
            f"a head has {dim} channels: the decode kernel takes multiples of 8, so this model "
            "cannot be converted"
        )
    return ModelConfig(
        vocabulary=_size(settings, "vocab_size"),
        attention="full",
        starts=0,
        span=min(_SPAN, fields["context"]),
        **fields,
    )


def _layers(settings: Settings, name: str = "num_hidden_layers") -> int:
    return _size(settings, name, largest=_MOST_LAYERS)


def _head_dim(width: int, heads: int) -> int:
    if width % heads or width // heads > _WIDEST_HEAD:
        raise PretrainedError(f"a width of {width} has no {heads} equal heads")
    return width // heads


def _windows(settings: Settings, layers: int) -> tuple[int, ...]:
    """For each layer, how many tokens it attends to; empty if none has a window."""
    window = settings.get("sliding_window")
    if window is None or not (
        settings["model_type"] == "mistral" or settings.get("use_sliding_window")
    ):
        return ()
    window = _size(settings, "sliding_window")
    if settings["model_type"] == "mistral":
        return (window,) * layers
    kinds = settings.get("layer_types")
    if kinds is None and settings["model_type"] == "smollm3":
        slid = set(_unturned(settings, layers))
        kinds = ["sliding_attention" if n in slid else "full_attention" for n in range(layers)]
    elif kinds is None:
        first = settings.get("max_window_layers", 28)
        kinds = ["sliding_attention" if n >= first else "full_attention" for n in range(layers)]
    if len(kinds) != layers:
        raise PretrainedError(f"layer_types has {len(kinds)} entries for {layers} layers")
    if unknown := sorted({*kinds} - {"full_attention", "sliding_attention"}):
        raise PretrainedError(f"layer_types has {shown(unknown[0])}, which is not supported")
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def _unturned(settings: Settings, layers: int) -> tuple[int, ...]:
    """Layers without rotary positions. The list in the settings has a 0 for each of them."""
    turned = settings.get("no_rope_layers")
    if turned is None:
        every = _size(settings, "no_rope_layer_interval", 4)
        turned = [(layer + 1) % every for layer in range(layers)]
    if len(turned) != layers:
        raise PretrainedError(f"no_rope_layers has {len(turned)} entries for {layers} layers")
    return tuple(layer for layer, turns in enumerate(turned) if not turns)


def _activation(settings: Settings, name: str, default: str) -> Activation:
    given = settings.get(name, default)
    if given not in [*_ACTIVATIONS]:
        raise PretrainedError(
            f"{name} is {shown(given)}; supported are {', '.join(_ACTIVATIONS)}: this model "
            "cannot be converted"
        )
    return _ACTIVATIONS[given]


def _size(
    settings: Settings, name: str, default: int | None = None, largest: int = _LARGEST
) -> int:
    value = settings.get(name)
    if value is None:
        value = default
    if value is None:
        raise PretrainedError(f"the settings of the model lack {name}")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= largest:
        raise PretrainedError(f"{name} is {shown(value)}: it must be from 1 to {largest:,}")
    return value


def _real(settings: Settings, name: str, default: float) -> float:
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise PretrainedError(f"{name} is {shown(value)}: it must be a number")
    return float(value)
