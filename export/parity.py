"""Checks that the exported graphs, run as a stream, compute the same as the trained model.

The reference is the parallel forward in float64. For caches in int8 it is the model as a stream, in
float64, with keys and values rounded as the kernel and the folds round them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from concertina.bundle.resources import kept_entries
from concertina.v1 import bundle_pb2 as pb
from export.graphs import (
    LARGEST,
    FoldGraph,
    StepGraph,
    Units,
    other_lengths,
    schedule_of,
    state_tensors,
)
from export.streaming import Array, Graphs, Stream, prefill
from model.attention import push_and_attend
from model.decoder import Decoder
from model.layers.architecture import OURS
from model.patterns.pattern import Schedule

TOLERANCE = 1e-4
"""Largest difference of a logit."""
HALF_TOLERANCE = 0.01
"""With float16 caches: largest difference of a logit, as a fraction of the largest logit."""
INTEGER_TOLERANCE = 0.02
"""With int8 caches: the same. A number halfway between two integers may be rounded either way."""
ROUNDED_TOLERANCE = 0.1
"""With activations rounded to 8 bits: the same, as a fraction of the largest logit."""

_PIECE = 1 << 24
"""Largest number of weights to widen at once."""


class ParityError(Exception):
    """The exported graphs differ from the trained model by more than the tolerance."""


def check_parity(
    folder: Path,
    manifest: pb.Manifest,
    model: Decoder,
    seed: int = 0,
    rounded: bool = False,
    units: Units | None = None,
) -> pb.Parity:
    """Largest difference of a logit between the graphs in `folder` and `model`.

    Compares every prefix length up to 3 spans + 2, behind the blocks that no fold takes; several
    chunkings; and a batch of streams at different positions. Raises ParityError above `TOLERANCE`
    or, for an architecture that is not ours, above what PyTorch's forward in float32 differs, if
    that is more: such logits are as large as they are. If the state is float16, the limit is
    `HALF_TOLERANCE`; if it is int8 with these `units`, `INTEGER_TOLERANCE`; if activations are
    `rounded`, `ROUNDED_TOLERANCE`.
    """
    rng = np.random.default_rng(seed)
    span = model.config.span
    kept = manifest.fold.keep_first + manifest.fold.keep_newest
    length = min((3 + kept) * span + 2, manifest.context)
    tokens = rng.integers(manifest.vocabulary, size=(4, length))
    if model.config.starts:
        tokens[:, 0] = manifest.vocabulary + rng.integers(1 + len(manifest.labels), size=4)
    with torch.no_grad():
        inputs, exact = torch.from_numpy(tokens), _widened(model)
        logits = exact(inputs) if units is None else _rounded_logits(exact, units, inputs)
        expected = logits.numpy()  # [4, length, vocabulary]
        tolerance, largest = TOLERANCE, float(np.abs(expected).max())
        if model.config.architecture != OURS:
            single = model(inputs).numpy()
            tolerance = max(tolerance, float(np.abs(single - expected).max()))

    graphs = Graphs(folder, manifest)
    worst, positions = 0.0, 0
    for limit in (1, max(2, span // 3), span):
        stream = graphs.start(1, length)
        got = prefill(graphs, stream, tokens[:1], limit, rng if limit < span else None)
        worst = _worse(worst, got, expected[:1])
        positions += length
    for end in range(1, length):
        got = prefill(graphs, graphs.start(1, length), tokens[1:2, :end], span, None)
        worst = _worse(worst, got, expected[1:2, :end])
        positions += end
    worst = _mixed_phases(graphs, tokens, expected, span, worst)
    positions += 4 * length

    if rounded:
        tolerance = ROUNDED_TOLERANCE * largest
    elif units is not None:
        tolerance = INTEGER_TOLERANCE * largest
    elif any(tensor.data_type == pb.DATA_TYPE_FLOAT16 for tensor in manifest.state):
        tolerance = HALF_TOLERANCE * largest
    if not worst <= tolerance:
        raise ParityError(
            f"the exported graphs differ from the trained model by {worst:.3g} in a logit; "
            f"the limit is {tolerance:.3g}, so nothing was written"
        )
    return pb.Parity(max_error=worst, tolerance=tolerance, positions=positions)


class _Wide(nn.Module):
    """A Linear or an Embedding that computes in float64, and widens its weights when it does.

    A module that is converted converts what it is made of; the one in `narrow` stays as it is.
    """

    def __init__(self, module: nn.Linear | nn.Embedding) -> None:
        super().__init__()
        self.narrow = (module,)

    def forward(self, x: Tensor) -> Tensor:
        (module,) = self.narrow
        if isinstance(module, nn.Embedding):
            looked_up: Tensor = module(x)
            return looked_up.double()
        rows = max(1, _PIECE // module.in_features)
        products = [F.linear(x, part.double()) for part in module.weight.split(rows)]
        product = torch.cat(products, dim=-1)
        return product if module.bias is None else product + module.bias.double()


def _widened(model: Decoder) -> Decoder:
    """`model` in float64, without another copy of its matrices: they are widened a piece at a time.

    That changes no number of them, so the logits are those of a copy in float64.
    """
    matrices = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    return copy.deepcopy(model, {id(module): _Wide(module) for module in matrices}).double()


def _worse(worst: float, got: Array, expected: npt.NDArray[np.float64]) -> float:
    """The larger of `worst` and the largest difference; NaN if either is NaN."""
    return float(np.maximum(worst, np.abs(got - expected).max()))


def _mixed_phases(
    graphs: Graphs,
    tokens: npt.NDArray[np.int64],
    expected: npt.NDArray[np.float64],
    span: int,
    worst: float,
) -> float:
    """Decode four streams at different positions in one batch; each leaves it at its end."""
    length = tokens.shape[1]
    solos = []
    last = length - span - 1  # in the block before the last one
    for row, begun in enumerate((1, span - 1, span, max(1, last))):
        solo = graphs.start(1, length)
        got = prefill(graphs, solo, tokens[row : row + 1, : min(begun, length - 1)], span, None)
        worst = _worse(worst, got, expected[row : row + 1, : got.shape[1]])
        solos.append(solo)
    batch = Stream(
        {name: np.concatenate([s.state[name] for s in solos]) for name in solos[0].state},
        np.concatenate([s.positions for s in solos]),
        np.concatenate([s.lengths for s in solos]),
    )
    rows = np.arange(len(solos))
    while len(rows):
        at = batch.positions.copy()
        got = graphs.step(batch, tokens[rows, at][:, None])[:, 0]
        worst = _worse(worst, got, expected[rows, at])
        stay = batch.positions < length
        if not stay.all():
            rows = rows[stay]
            batch = Stream(
                {name: values[stay] for name, values in batch.state.items()},
                batch.positions[stay],
                batch.lengths[stay],
            )
    return worst


def _rounded_logits(model: Decoder, units: Units, tokens: Tensor) -> Tensor:
    """Logits `[B, T, vocabulary]` of streams whose keys and values are whole multiples of `units`.

    The exported graphs share no rounding with this, so that the two check each other.
    """
    schedule, tensors = schedule_of(model), state_tensors(model)
    stacks = [tensor.kind == pb.STATE_KIND_STACK for tensor in tensors]
    batch, length = tokens.shape
    shapes = [[*t.shape] for t in tensors]
    for shape, stack in zip(shapes, stacks, strict=True):
        if stack:  # most contexts are longer than what is compared
            shape[1] = min(shape[1], length)
    state = [
        torch.full((batch, *shape), t.initial).double()
        for shape, t in zip(shapes, tensors, strict=True)
    ]
    step, fold = StepGraph(model, _attend_rounded, units), FoldGraph(model)
    places = {tensor.name: place for place, tensor in enumerate(tensors)}
    kept = [kept_entries(tensor) for tensor in tensors]
    parts, span = [], schedule.span if schedule else length
    for begin in range(0, length, span):
        end = min(begin + span, length)
        grown = {
            each: _entries(schedule, begin, each) + end - begin
            for each in (1, *other_lengths(model), *kept)
        }
        most = {each: torch.tensor(entries) for each, entries in grown.items()}
        logits, changed = step(
            tokens[:, begin:end],
            torch.arange(begin, end).expand(batch, -1),
            most[1].expand(batch),
            most[1],
            torch.arange(batch * (end - begin)),
            state,
            [x for each in other_lengths(model) for x in (most[each].expand(batch), most[each])],
        )
        parts.append(logits.view(batch, end - begin, -1))
        for name, values in zip(step.changed, changed, strict=True):
            state[places[name]] = values
        if schedule is None or not schedule.folds(end):
            continue
        taken = (end & -end).bit_length() if schedule.binary else schedule.taken
        firsts = [grown[each] - taken for each in kept]
        given = [
            values[:, :, first : first + taken] if stack else values
            for values, stack, first in zip(state, stacks, firsts, strict=True)
        ]
        folded = fold(given, torch.full((batch,), end))
        for name, values in zip(fold.changed, folded, strict=True):
            place = places[name]
            if name in units:
                values = _round(values, units[name])
            if stacks[place]:
                state[place][:, :, firsts[place] : firsts[place] + values.shape[2]] = values
            else:
                state[place] = values
    return torch.cat(parts, dim=1)


def _entries(schedule: Schedule | None, pushed: int, kept: int) -> int:
    """Entries of a stack that keeps `kept` of a folded block, after `pushed` tokens."""
    return pushed if schedule is None else schedule.entries(pushed, kept)


def _attend_rounded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    longest: Tensor,
    units: Sequence[Tensor],
    *,
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    k, v = (_round(x, unit) for x, unit in zip((k, v), units, strict=True))
    return push_and_attend(q, k, v, keys, values, lengths, window)


def _round(x: Tensor, unit: Tensor) -> Tensor:
    """`x[B, H, T, D]` in whole multiples of `unit[H, 1, D]`, of which there are 256."""
    return (x / unit.double()).round().clamp(-LARGEST - 1, LARGEST) * unit.double()
