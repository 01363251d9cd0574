"""Runs the graphs of a bundle over data: how well they predict it, and how far caches reach."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from concertina.v1 import bundle_pb2 as pb
from export.graphs import CACHES, LARGEST, Units
from export.streaming import Array, Graphs, prefill
from export.windows import Windows
from model.data import Tokens
from model.decoder import Decoder

_LEAST = 1e-4  # unit of a channel that is always 0; float16 holds it in full
_CHUNK = 64  # tokens per pass; fewer before a fold


def heldout_bits(folder: Path, manifest: pb.Manifest, windows: Windows) -> tuple[float, int]:
    """Bits per held-out byte or pixel of the graphs in `folder`, and the number of tokens."""
    graphs = Graphs(folder, manifest)
    nats, count = 0.0, 0
    for inputs, targets in windows.heldout:
        stream = graphs.start(1, inputs.shape[1])
        logits = prefill(graphs, stream, inputs, _CHUNK, None)[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, targets[0, :, None], -1)[:, 0]
        nats += float((np.log(np.exp(logits).sum(-1)) - chosen).sum())
        count += targets.size
    return nats / windows.size / math.log(2), count


def cache_units(
    folder: Path, manifest: pb.Manifest, windows: Iterable[Tokens], turning: int = 0
) -> Units:
    """What 1 means in the caches of the graphs in `folder` once they are int8; see `Units`.

    The largest number of each head and channel is `LARGEST`. Entries of tokens and summaries share
    the unit, as the kernel knows only one. turning: how many pairs of channels of keys turn with
    the position; both of a pair get the unit of the longest key in it, since one that comes later
    than any of `windows` may point anywhere.
    """
    graphs = Graphs(folder, manifest)
    most: dict[str, Array] = {}
    for inputs in windows:
        stream, done = graphs.start(1, inputs.shape[1]), 0
        while done < inputs.shape[1]:
            room = _CHUNK if graphs.span is None else graphs.span - done % graphs.span
            part = np.ascontiguousarray(inputs[:, done : done + min(_CHUNK, room)])
            graphs.push(stream, part)
            done += part.shape[1]
            for tensor in graphs.tensors:
                if tensor.kind == pb.STATE_KIND_STACK and tensor.name.split(".")[0] in CACHES:
                    count = int(graphs.unfolded(stream, tensor)[0])
                    valid = np.abs(stream.state[tensor.name][0, :, :count])
                    if tensor.name.startswith("keys."):
                        valid = _longest(valid, turning)
                    reached = valid.max(1, keepdims=True).astype(np.float32)
                    most[tensor.name] = np.maximum(most.get(tensor.name, reached), reached)
            graphs.fold(stream)
    # The graphs store units as float16, like all matrices.
    return {
        name: torch.from_numpy(np.maximum(reached / LARGEST, _LEAST).astype(np.float16)).float()
        for name, reached in most.items()
    }


def turning_pairs(model: Decoder) -> int:
    """How many pairs of channels of each key turn with the position; see `Rope`."""
    rope = model.config.architecture.rope
    return 0 if rope is None else len(rope.frequencies)


def _longest(keys: Array, turning: int) -> Array:
    """`keys[H, E, D]` with the length of the pair in both channels of each pair that turns."""
    one, other = keys[..., :turning], keys[..., turning : 2 * turning]
    lengths = np.hypot(one, other)
    return np.concatenate((lengths, lengths, keys[..., 2 * turning :]), axis=-1)
