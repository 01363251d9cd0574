"""Attention by definition: explicit index sets, loops and float64 (arXiv 2107.05768, section 3).

The oracle of these tests; it shares nothing with model/ but the index sets, which are tested by
themselves, and is meant to be read beside the paper. Queries arrive divided by sqrt(head_dim);
arrays are `[heads, tokens, D]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from model.patterns.pattern import Support

Array = npt.NDArray[np.float64]
Pool = Callable[[Array], Array]
"""Tokens of a span, `[heads, tokens, D]`, to one, `[heads, D]`."""
Summary = Callable[[Array, Array, Array, Sequence[int], int], tuple[Array, Array]]
"""q, k, v, a span and its reader to the key and value of the span's one entry, `[heads, D]`."""


def attend(q: Array, k: Array, v: Array, supports: Sequence[Support], summary: Summary) -> Array:
    """What each token reads: one softmax over its direct tokens and its spans' summaries."""
    read = []
    for reader, support in enumerate(supports):
        entries = [(k[:, j], v[:, j]) for j in support.direct]
        entries += [summary(q, k, v, span, reader) for span in support.spans]
        keys, values = (np.stack(parts, axis=1) for parts in zip(*entries, strict=True))
        read.append(expectation(q[:, reader], keys, values))
    return np.stack(read, axis=1)


def pooled(of_queries: Pool, of_keys: Pool) -> Summary:
    """Eq. 8: the pooled query's expectation over the span, under the pooled key."""

    def summary(
        q: Array, k: Array, v: Array, span: Sequence[int], reader: int
    ) -> tuple[Array, Array]:
        tokens = list(span)
        value = expectation(of_queries(q[:, tokens]), k[:, tokens], v[:, tokens])
        return of_keys(k[:, tokens]), value

    return summary


def by_maximum(span: Array) -> Array:
    """The paper's pooling."""
    pooled: Array = span.max(axis=1)
    return pooled


def by_mean(span: Array) -> Array:
    """A pooling of the reference's TensorFlow code, as is the next."""
    pooled: Array = span.sum(axis=1) / span.shape[1]
    return pooled


def by_deep_set(layer: Array) -> Pool:
    """The maximum of what a layer `[D, D]`, shared by the heads, and a ReLU make of the tokens."""
    return lambda span: by_maximum(np.maximum(0, np.einsum("od,htd->hto", layer, span)))


def hierarchical(
    q: Array, k: Array, v: Array, span: Sequence[int], reader: int
) -> tuple[Array, Array]:
    """p(j|S) = p(j|half) p(half|S), down to single tokens."""
    tokens = list(span)
    if len(tokens) == 1:
        return k[:, tokens[0]], v[:, tokens[0]]
    middle = len(tokens) // 2
    halves = [hierarchical(q, k, v, half, reader) for half in (tokens[:middle], tokens[middle:])]
    keys, values = (np.stack(parts, axis=1) for parts in zip(*halves, strict=True))
    return by_maximum(k[:, tokens]), expectation(by_maximum(q[:, tokens]), keys, values)


def row_major(
    x: Array, out: Array, gain: Array, bias: Array, key: Array, epsilon: float = 1e-5
) -> Summary:
    """A row as its token above the reader would have read it, had it seen the row (3.4).

    `x` is the layer's input `[tokens, width]`; the key is projected from x + out(G), normalised.
    """

    def summary(
        q: Array, k: Array, v: Array, span: Sequence[int], reader: int
    ) -> tuple[Array, Array]:
        tokens = list(span)
        above = tokens[reader % len(tokens)]
        value = expectation(q[:, above], k[:, tokens], v[:, tokens])
        hidden = x[above] + out @ value.flatten()
        spread = np.sqrt(hidden.var() + epsilon)
        normed = gain * (hidden - hidden.mean()) / spread + bias
        return (key @ normed).reshape(value.shape), value

    return summary


def expectation(query: Array, keys: Array, values: Array) -> Array:
    """Softmax attention of one query, `[heads, D]`, to entries `[heads, E, D]`."""
    logits = np.einsum("hd,hed->he", query, keys)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    read: Array = np.einsum("he,hed->hd", weights, values)
    return read
