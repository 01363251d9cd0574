"""Measures how well the graphs of a bundle predict held-out data."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from concertina.v1 import bundle_pb2 as pb
from export.streaming import Graphs, prefill
from model.data import Dataset, heldout_batches

TOKENS = 1 << 16
"""Largest number of held-out tokens to measure: whole windows, spread evenly over the data."""
_CHUNK = 64  # tokens per pass; fewer before a fold


def heldout_bits(folder: Path, manifest: pb.Manifest, dataset: Dataset) -> tuple[float, int]:
    """Bits per held-out token of the graphs in `folder`, and the number of tokens measured.

    Raises ValueError if the data is shorter than one window.
    """
    graphs = Graphs(folder, manifest)
    limit = max(1, TOKENS // manifest.context)
    nats, count = 0.0, 0
    for inputs, targets in heldout_batches(dataset, manifest.context, 1, limit):
        logits = prefill(graphs, graphs.start(1), inputs, _CHUNK, None)[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, targets[0, :, None], -1)[:, 0]
        nats += float((np.log(np.exp(logits).sum(-1)) - chosen).sum())
        count += targets.size
    if not count:
        raise ValueError(f"the held-out data is shorter than one window of {manifest.context}")
    return nats / count / math.log(2), count
