"""Attention by definition: explicit index sets, loops and float64 (arXiv 2107.05768, section 3).

The oracle of these tests. It shares nothing with model/attention.py, and is meant to be read
beside the paper. Queries arrive already divided by sqrt(head_dim); arrays are `[heads, tokens, D]`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def supports(position: int, span: int) -> tuple[range, list[range]]:
    """What a token attends to: raw tokens (Omega^0, itself included), and blocks (Omega^1 …)."""
    own = position // span
    return range(own * span, position + 1), [range(r * span, (r + 1) * span) for r in range(own)]


def fixed_attention(q: Array, k: Array, v: Array, span: int) -> Array:
    """Combiner-Fixed, equations 4 to 10 with block 0 included."""
    out = np.empty_like(v)
    for head, i in np.ndindex(*q.shape[:2]):
        direct, blocks = supports(i, span)
        keys = [k[head, j] for j in direct]
        values = [v[head, j] for j in direct]
        for block in blocks:
            pooled_query = np.max([q[head, j] for j in block], axis=0)
            keys.append(np.max([k[head, j] for j in block], axis=0))
            values.append(_attend(pooled_query, k[head, block], v[head, block]))
        out[head, i] = _attend(q[head, i], np.array(keys), np.array(values))
    return out


def full_attention(q: Array, k: Array, v: Array) -> Array:
    """Every token to itself and all earlier ones."""
    out = np.empty_like(v)
    for head, i in np.ndindex(*q.shape[:2]):
        out[head, i] = _attend(q[head, i], k[head, : i + 1], v[head, : i + 1])
    return out


def _attend(query: Array, keys: Array, values: Array) -> Array:
    logits = np.array([query @ key for key in keys])
    weights = np.exp(logits - logits.max())
    expectation: Array = weights / weights.sum() @ values
    return expectation
