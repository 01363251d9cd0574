"""Fits the summaries of every layer, the model being frozen, and measures what each layer loses.

One pass over the layers: each gets the output of full attention below it, so that what a layer
learns does not depend on how the others attend. After every layer the pass is saved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from model.attention import causal_attention
from model.decoder import Block, Decoder
from model.layers.positions import Turn
from model.patterns.folded import Folded
from model.patterns.pattern import Pattern
from model.run import PARTIAL
from model.uptraining.choose import LayerErrors
from model.uptraining.weights import put_numbers, summary_numbers

PASS = "summaries.safetensors"
_ROWS = 256  # tokens whose attention is compared in a step


@dataclass(frozen=True)
class FitConfig:
    """Settings of a fit."""

    steps: int = 80
    rate: float = 0.03
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """One layer done."""

    layer: int
    errors: LayerErrors


class Interrupted(Exception):
    """The pass was asked to stop; what is done is saved."""


@torch.no_grad()
def fit_layers(
    model: Decoder,
    tokens: Tensor,
    fit: FitConfig,
    folder: Path,
    key: str,
    on_layer: Callable[[Fitted], None] = lambda done: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[LayerErrors]:
    """Fit the summaries of `model`, whose layers all fold, on `tokens[B, T]`: errors by layer.

    The last window is not fitted on; errors are measured there. folder: where the pass is saved; a
    pass with the same `key`, which stands for model, tokens and settings, goes on where it ended.
    Raises Interrupted after a layer if `stop` says so.
    """
    positions = torch.arange(tokens.shape[1])[None]
    turn = model.rotary.turn_at(positions) if model.rotary is not None else None
    x, errors = _restore(model, folder, key)
    if x is None:
        x = model.embed_at(tokens, positions)
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        if layer < len(errors):
            continue
        x, found = _fit_layer(block, x, turn, replace(fit, seed=fit.seed + layer))
        errors.append(found)
        _save(model, folder, key, x, errors)
        on_layer(Fitted(layer, found))
        if stop():
            raise Interrupted(f"{folder}: stopped after layer {layer + 1} of {len(model.blocks)}")
    return errors


def _fit_layer(
    block: Block, x: Tensor, turn: Turn | None, fit: FitConfig
) -> tuple[Tensor, LayerErrors]:
    """The input of the next layer `[B, T, width]`, and the errors of this one."""
    if not isinstance(block.pattern, Folded):  # it slides already
        following = [block(row[None], _as_it_is, turn) for row in x]
        return torch.cat(following), LayerErrors(0.0, 0.0, 0.0)
    rows, following = [], []
    for row in x:
        given = _Given(*_attended(block, row[None], turn))
        rows.append(given)
        following.append(block.add(row[None], given.mixed))
    pattern, held = block.pattern, rows[-1:]
    chunks = [*_chunks(pattern, x.shape[1])]
    window = _error(block, held, chunks, folds=False)
    tangent = _error(block, held, chunks)
    _adjust(block, rows[:-1] or rows, chunks, fit)
    return torch.cat(following), LayerErrors(window, tangent, _error(block, held, chunks))


@dataclass(frozen=True)
class _Given:
    """What a layer makes of one window."""

    q: Tensor
    k: Tensor
    v: Tensor
    mixed: Tensor
    """Output of full attention, before its projection."""


def _attended(block: Block, x: Tensor, turn: Turn | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    taken: list[Tensor] = []

    def attend(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, normed: Tensor) -> Tensor:
        taken.extend((q, k, v))
        return causal_attention(q, k, v)

    mixed = block.mix(x, attend, turn)
    q, k, v = taken
    return q, k, v, mixed


def _as_it_is(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    out: Tensor = pattern(q, k, v, x)
    return out


def _chunks(pattern: Folded, length: int) -> Iterator[tuple[int, int]]:
    """Parts of a window in which tokens attend to summaries; the whole of it if it is short."""
    step = max(pattern.span, _ROWS // pattern.span * pattern.span)
    first = (pattern.sink + pattern.window + 1) * pattern.span
    for begin in range(min(first, max(0, length - step)), length, step):
        yield begin, min(length, begin + step)


def _adjust(
    block: Block, rows: list[_Given], chunks: list[tuple[int, int]], fit: FitConfig
) -> None:
    """Adam on the summary's own numbers, which are few."""
    numbers = [*block.pattern.parameters()]
    generator = torch.Generator().manual_seed(fit.seed)
    for number in numbers:
        number.requires_grad_(True)
    with torch.enable_grad():
        optimiser = torch.optim.Adam(numbers, fit.rate)
        for step in range(fit.steps):
            optimiser.param_groups[0]["lr"] = fit.rate * (1 - step / fit.steps)
            chosen = int(torch.randint(len(chunks), (), generator=generator))
            lost, size = _difference(block, rows[step % len(rows)], *chunks[chosen])
            optimiser.zero_grad()
            (lost / size).backward()
            optimiser.step()
    for number in numbers:
        number.requires_grad_(False)


def _error(
    block: Block, rows: list[_Given], chunks: list[tuple[int, int]], folds: bool = True
) -> float:
    parts = [_difference(block, row, *chunk, folds=folds) for row in rows for chunk in chunks]
    lost, size = (sum(float(part[n]) for part in parts) for n in (0, 1))
    return lost / size


def _difference(
    block: Block, given: _Given, begin: int, end: int, folds: bool = True
) -> tuple[Tensor, Tensor]:
    """Squares of what a chunk's attention output differs by, and of its size."""
    pattern = block.pattern
    assert isinstance(pattern, Folded)
    q, k, v = given.q, given.k, given.v
    far = pattern.summaries(q, k, v) if folds else (k[:, :, :0], v[:, :, :0])
    read = pattern.read(q, k, v, *far, begin, end).transpose(1, 2).flatten(2)
    wanted = F.linear(given.mixed[:, begin:end], block.out.weight)
    return (F.linear(read, block.out.weight) - wanted).pow(2).sum(), wanted.pow(2).sum()


def _save(model: Decoder, folder: Path, key: str, x: Tensor, errors: list[LayerErrors]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (PASS + PARTIAL)
    noted = {"key": key, "errors": json.dumps([asdict(each) for each in errors])}
    save_file({**summary_numbers(model), "x": x.contiguous()}, partial, noted)
    os.replace(partial, folder / PASS)


def _restore(model: Decoder, folder: Path, key: str) -> tuple[Tensor | None, list[LayerErrors]]:
    if not (folder / PASS).exists():
        return None, []
    with safe_open(folder / PASS, framework="pt") as file:
        noted = file.metadata()
        if noted["key"] != key:
            return None, []
        names = [name for name in file.keys() if name != "x"]  # noqa: SIM118 - not a dict
        put_numbers(model, {name: file.get_tensor(name) for name in names})
        return file.get_tensor("x"), [LayerErrors(**e) for e in json.loads(noted["errors"])]
