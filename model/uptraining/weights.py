"""The same weights in a model whose layers attend in other ways."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model.config import ModelConfig
from model.decoder import Decoder

_OF_A_SUMMARY = ".pattern."


def given_weights(
    config: ModelConfig, source: Decoder, numbers: Mapping[str, Tensor] | None = None
) -> Decoder:
    """A model as `config` says with the weights of `source`, and these `numbers` of summaries.

    Numbers of layers that do not fold are left out; summaries without numbers are as before a fit.
    """
    model = Decoder(config)
    own = {name: x for name, x in model.state_dict().items() if _OF_A_SUMMARY in name}
    given = {name: x for name, x in (numbers or {}).items() if name in own}
    model.load_state_dict({**source.state_dict(), **own, **given})
    return model.eval().requires_grad_(False)


def summary_numbers(model: Decoder) -> dict[str, Tensor]:
    """What was fitted, by name."""
    return {
        name: x.detach().contiguous()
        for name, x in model.named_parameters()
        if _OF_A_SUMMARY in name
    }


@torch.no_grad()
def put_numbers(model: Decoder, numbers: Mapping[str, Tensor]) -> None:
    """Put back what `summary_numbers` gave."""
    known = dict(model.named_parameters())
    for name, values in numbers.items():
        known[name].copy_(values)
