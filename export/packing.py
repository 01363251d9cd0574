"""Matrices in few bits: blocks of integers that share a scale, in the layout of MatMulNBits.

Shapes: `N` outputs, `K` inputs of a matrix `[N, K]`; `b` inputs in each of `ceil(K / b)` blocks.
An integer of `bits` bits stands for `(integer - 2^(bits-1)) * scale`. Two integers of 4 bits share
a byte, the earlier one in its low half. The last block of a row is filled with zeros.

The layout is that of onnxruntime's `com.microsoft.MatMulNBits` (docs/ContribOperators.md) without
zero points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]

_SHRINK = np.linspace(1, 0.7, 13, dtype=np.float32)
"""Scales that are tried, as parts of the one that cuts no weight off."""


@dataclass(frozen=True)
class Packed:
    """A matrix `[N, K]` in few bits."""

    integers: npt.NDArray[np.uint8]
    """`[N, blocks, b * bits / 8]`."""
    scales: Matrix
    """`[N, blocks]`, each of them a float16 number."""
    bits: int
    columns: int
    """K."""

    @property
    def block(self) -> int:
        """Weights that share a scale."""
        bytes_of_block: int = self.integers.shape[2]
        return bytes_of_block * 8 // self.bits


def pack(matrix: Matrix, bits: int, block: int) -> Packed:
    """`matrix[N, K]` in `bits` (4 or 8) bits; each block has the scale with the least square error.

    A scale may be negative: the weight farthest from zero lies on the side that reaches one
    integer farther.
    """
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
    return Packed(codes, scales[..., 0], bits, columns)


def unpack(packed: Packed) -> Matrix:
    """The matrix `[N, K]` that `packed` stands for."""
    codes: npt.NDArray[np.uint8] = packed.integers
    if packed.bits == 4:
        pairs = np.stack((codes & 15, codes >> 4), axis=-1)
        codes = pairs.reshape(*codes.shape[:2], -1)
    values = (codes.astype(np.float32) - (1 << (packed.bits - 1))) * packed.scales[..., None]
    matrix: Matrix = values.reshape(len(codes), -1)[:, : packed.columns]
    return matrix
