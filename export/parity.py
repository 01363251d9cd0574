"""Checks that the exported graphs, run as a stream, compute the same as the trained model.

The reference is the parallel forward in float64.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from concertina.v1 import bundle_pb2 as pb
from export.streaming import Array, Graphs, Stream, prefill
from model.decoder import Decoder
from model.layers.architecture import OURS

TOLERANCE = 1e-4
"""Largest difference of a logit."""
NOISE = 3.0
"""For an architecture that is not ours, the same or this multiple of what PyTorch's own float32
forward differs from float64, if that is more: its logits and its depth are what they are."""
HALF_TOLERANCE = 0.01
"""With float16 caches: largest difference of a logit, as a fraction of the largest logit."""
ROUNDED_TOLERANCE = 0.1
"""With activations rounded to 8 bits: the same, as a fraction of the largest logit."""


class ParityError(Exception):
    """The exported graphs differ from the trained model by more than the tolerance."""


def check_parity(
    folder: Path, manifest: pb.Manifest, model: Decoder, seed: int = 0, rounded: bool = False
) -> pb.Parity:
    """Largest difference of a logit between the graphs in `folder` and `model`.

    Compares every prefix length up to 3 spans + 2, several chunkings, and a batch of streams at
    different positions. Raises ParityError above `TOLERANCE`, or `NOISE` times that of float32 for
    an architecture that is not ours; if the state is float16, above `HALF_TOLERANCE`; if
    activations are `rounded`, above `ROUNDED_TOLERANCE`.
    """
    graphs = Graphs(folder, manifest)
    rng = np.random.default_rng(seed)
    span = model.config.span
    length = min(3 * span + 2, manifest.context)
    tokens = rng.integers(manifest.vocabulary, size=(4, length))
    if model.config.starts:
        tokens[:, 0] = manifest.vocabulary + rng.integers(1 + len(manifest.labels), size=4)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = exact(torch.from_numpy(tokens)).numpy()  # [4, length, vocabulary]

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

    tolerance, largest = TOLERANCE, float(np.abs(expected).max())
    if model.config.architecture != OURS:
        with torch.no_grad():
            single = model(torch.from_numpy(tokens)).numpy()
        tolerance = max(tolerance, NOISE * float(np.abs(single - expected).max()))
    if rounded:
        tolerance = ROUNDED_TOLERANCE * largest
    elif any(tensor.data_type == pb.DATA_TYPE_FLOAT16 for tensor in manifest.state):
        tolerance = HALF_TOLERANCE * largest
    if not worst <= tolerance:
        raise ParityError(
            f"the exported graphs differ from the trained model by {worst:.3g} in a logit; "
            f"the limit is {tolerance:.3g}, so nothing was written"
        )
    return pb.Parity(max_error=worst, tolerance=tolerance, positions=positions)


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
    for row, begun in enumerate((1, span - 1, span, 2 * span + 1)):
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
