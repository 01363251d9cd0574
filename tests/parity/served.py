"""A bundle on the served path (Runtime and Cache), and the float64 forward of its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from concertina.v1 import bundle_pb2 as pb
from export.weights import load_decoder
from server.arrays import Floats, Ints
from server.bundles.bundle import load_bundle
from server.engine.kv_cache import Cache, num_rows, prefill_row
from server.runtime.onnx_session import Runtime

TOLERANCE = 1e-4
Logits = npt.NDArray[np.float64]


def draw_tokens(folder: Path, rows: int, length: int | None = None, seed: int = 0) -> Ints:
    """Random streams `[rows, length]`, each with a start token first; by default of the context."""
    manifest = load_bundle(folder).manifest
    rng = np.random.default_rng(seed)
    tokens = rng.integers(manifest.vocabulary, size=(rows, length or manifest.context))
    tokens[:, 0] = manifest.vocabulary + rng.integers(1 + len(manifest.labels), size=rows)
    return tokens


def expected_logits(folder: Path, tokens: Ints, dtype: torch.dtype = torch.float64) -> Logits:
    """Logits `[rows, length, vocabulary]` of all positions in parallel, computed in `dtype`."""
    with torch.no_grad():
        logits = load_decoder(folder).to(dtype)(torch.from_numpy(tokens))
    wide: Logits = logits.double().numpy()
    return wide


def assert_parity(got: Floats, expected: Logits, tolerance: float = TOLERANCE) -> None:
    """Checks that every logit is within the tolerance. NaN is not."""
    assert got.shape == expected.shape
    worst = np.abs(got - expected).max()
    assert worst <= tolerance, f"off by {worst}"


class Served:
    """A cache and its runtime. Values that no stream may read are set to `poison`."""

    def __init__(
        self,
        folder: Path,
        slots: int = 4,
        poison: float = np.nan,
        prefix_bytes: int = 0,
        threads: int = 1,
    ) -> None:
        self.bundle = load_bundle(folder)
        self.slots = slots
        self.runtime = Runtime(self.bundle, num_rows(self.bundle, slots), threads)
        self.cache = Cache(self.bundle, self.runtime, slots, prefix_bytes)
        self.prefilling = False
        self.value = poison
        self.poison()

    def poison(self) -> None:
        """Overwrite the unused entries of used rows, and all entries of unused rows."""
        pushed = dict(enumerate(self.cache.pushed.tolist()))
        if self.prefilling:
            pushed[prefill_row(self.bundle, self.slots)] = self.cache.prefill_pushed
        for tensor in self.bundle.manifest.state:
            buffer = self.runtime.rows.buffers[tensor.name]
            value = 127 if buffer.dtype == np.int8 else self.value
            for row in range(num_rows(self.bundle, self.slots)):
                tokens = pushed.get(row, 0)
                if tensor.kind == pb.STATE_KIND_STACK:
                    kept = tensor.kept if tensor.HasField("kept") else 1
                    buffer[row, :, self.bundle.entries(tokens, kept) :] = value
                elif tensor.kind == pb.STATE_KIND_HISTORY:
                    buffer[row, tokens:] = value
                elif row not in pushed:
                    buffer[row] = value

    def start_prefill(self) -> None:
        """Clear the prefill slot for a new stream."""
        self.cache.start_prefill()
        self.prefilling = True
        self.poison()

    def prefill(self, tokens: Ints, limit: int | None = None) -> Floats:
        """Prefill `tokens[T]` in chunks of at most `limit`: `[T, vocabulary]`."""
        parts = []
        while len(tokens):
            count = min(limit or len(tokens), self.cache.block_room, len(tokens))
            parts.append(self.cache.prefill(tokens[:count], logits=True).copy())
            self.poison()
            tokens = tokens[count:]
        return np.concatenate(parts)

    def join(self) -> int:
        """Move the prefilled stream into the batch."""
        row = self.cache.join()
        self.prefilling = False
        self.poison()
        return row

    def step(self, tokens: Ints, ended: tuple[int, ...] = ()) -> Floats:
        """One token for every row, then the folds: `[B, vocabulary]`."""
        logits = self.cache.step(tokens).copy()
        self.cache.fold(ended)
        if not ended:  # an unfolded block of an ended row has more entries than counted
            self.poison()
        return logits

    def decode(self, tokens: Ints) -> Floats:
        """Step through `tokens[B, T]`: `[B, T, vocabulary]`."""
        return np.stack([self.step(column) for column in tokens.T], axis=1)

    def state(self, row: int) -> dict[str, npt.NDArray[np.generic]]:
        """The state in a row of the batch."""
        return self.cache.save(row).state
