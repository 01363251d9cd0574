"""Peak memory of training one attention layer, each measurement in a process of its own.

Linux only: the peak is read from /proc, because ru_maxrss cannot be reset and a process begins
with its parent's.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from model.config import Attention, ModelConfig
from model.patterns.pattern import Pattern

_HEAD_DIM = 16
_WARM_UP = 256
_LIMIT_S = 900.0

Make = Callable[[ModelConfig], Pattern]


@dataclass(frozen=True)
class Peak:
    """Growth of memory in one forward and backward of `pattern` over `length` tokens."""

    pattern: str
    length: int
    bytes: int


def measure_training(
    patterns: Mapping[Attention, Make], lengths: Sequence[int], heads: int
) -> list[Peak]:
    """Peaks of every pattern at every length, with span = sqrt(length). Raises RuntimeError."""
    peaks = []
    for name, make in patterns.items():
        for length in lengths:
            peaks.append(Peak(name, length, _probe(name, make, length, heads)))
            print(f"{name}, {length} tokens: {peaks[-1].bytes / 1e6:.1f} MB", file=sys.stderr)
    return peaks


def _probe(name: Attention, make: Make, length: int, heads: int) -> int:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(sender, name, make, length, heads))
    process.start()
    sender.close()
    what = f"{name} over {length} tokens with {heads} heads"
    try:
        if not receiver.poll(_LIMIT_S):
            raise RuntimeError(f"{what} took over {_LIMIT_S:.0f} s: take shorter lengths")
        peak: int = receiver.recv()
        return peak
    except EOFError:
        raise RuntimeError(f"{what} died, perhaps for lack of memory: take fewer heads") from None
    finally:
        process.kill()
        process.join(_LIMIT_S)


def _measure_peak(sender: Connection, name: Attention, make: Make, length: int, heads: int) -> None:
    torch.set_num_threads(1)
    # What is freed goes back at once (M_MMAP_THRESHOLD): glibc would keep and reuse some, unseen.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    _run_layer(name, make, _WARM_UP, heads)
    sender.send(_run_layer(name, make, length, heads))


def _run_layer(name: Attention, make: Make, length: int, heads: int) -> int:
    """Growth of the peak in bytes; it includes gradients of the inputs, not the inputs."""
    width = heads * _HEAD_DIM
    config = ModelConfig(
        7, context=length, width=width, heads=heads, span=math.isqrt(length), attention=name
    )
    pattern = make(config)
    q, k, v = (torch.randn(1, heads, length, _HEAD_DIM, requires_grad=True) for _ in range(3))
    x = torch.randn(1, length, width, requires_grad=True)
    # From here on the peak is that of the pass (proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_bytes()
    pattern(q, k, v, x).sum().backward()
    return _peak_bytes() - before


def _peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
