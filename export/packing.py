"""Quantised matrices: blocks of integers that share a scale, in the layout of MatMulNBits.

Shapes: a matrix `[N, K]` has `N` outputs and `K` inputs; each row has `ceil(K / b)` blocks of `b`
inputs. An integer of `bits` bits represents `(integer - 2^(bits-1)) * scale`. Two integers of 4
bits share a byte, the earlier one in the low half. The last block of a row is padded with zeros.

The layout is that of onnxruntime's `com.microsoft.MatMulNBits` (docs/ContribOperators.md) without
zero points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]

_PIECE = 1 << 22  # weights to quantise at a time: what is tried takes several times their memory
_SHRINK = np.linspace(1, 0.7, 13, dtype=np.float32)
"""Scales to try, as fractions of the scale that clips no weight."""


@dataclass(frozen=True)
class Packed:
    """A quantised matrix `[N, K]`."""

    integers: npt.NDArray[np.uint8]
    """`[N, blocks, b * bits / 8]`."""
    scales: Matrix
    """`[N, blocks]`, each of them a float16 number."""
    bits: int
    columns: int
    """K."""

    @property
    def block(self) -> int:
        """Number of weights that share a scale."""
        bytes_of_block: int = self.integers.shape[2]
        return bytes_of_block * 8 // self.bits


def pack(matrix: Matrix, bits: int, block: int) -> Packed:
    """Quantise `matrix[N, K]` to `bits` (4 or 8) bits, with the scale of least square error.

    A scale may be negative. The negative side has one integer more, and the scale's sign puts the
    weight of largest magnitude on that side.
    """
    rows = max(1, _PIECE // matrix.shape[1])
    parts = [
        _pack_rows(matrix[first : first + rows], bits, block)
        for first in range(0, len(matrix), rows)
    ]
    integers, scales = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Packed(integers, scales, bits, matrix.shape[1])


def _pack_rows(
    matrix: Matrix, bits: int, block: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Integers and scales of some rows; see Packed."""
    rows, columns = matrix.shape
    padded = np.pad(matrix, ((0, 0), (0, -columns % block)))
    blocks = padded.reshape(rows, -1, block)
    half = 1 << (bits - 1)
    farthest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    least = np.full(farthest.shape, np.inf, np.float32)
    integers, scales = np.zeros(blocks.shape, np.float32), np.zeros_like(farthest)
    for part in _SHRINK:
        scale = (part * farthest / -half).astype(np.float16).astype(np.float32)
        near = np.clip(np.rint(blocks / np.where(scale == 0, 1, scale)), -half, half - 1)
        error = np.square(near * scale - blocks).sum(-1, keepdims=True)
        better = error < least
        least = np.where(better, error, least)
        integers, scales = np.where(better, near, integers), np.where(better, scale, scales)
    codes: npt.NDArray[np.uint8] = (integers + half).astype(np.uint8)
    if bits == 4:
        codes = codes[..., ::2] + codes[..., 1::2] * np.uint8(16)
    return codes, scales[..., 0]


def unpack(packed: Packed) -> Matrix:
    """The matrix `[N, K]` that `packed` represents."""
    codes: npt.NDArray[np.uint8] = packed.integers
    if packed.bits == 4:
        pairs = np.stack((codes & 15, codes >> 4), axis=-1)
        codes = pairs.reshape(*codes.shape[:2], -1)
    values = (codes.astype(np.float32) - (1 << (packed.bits - 1))) * packed.scales[..., None]
    matrix: Matrix = values.reshape(len(codes), -1)[:, : packed.columns]
    return matrix
