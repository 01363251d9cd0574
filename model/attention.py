"""The kernels that the patterns share: softmax, spans, stacks, histories.

Shapes: `B` batch, `H` heads, `T` tokens, `s` span, `E` entries, `D` head_dim. The caller has
already divided queries by sqrt(D), as in the reference code, so pooled queries are not scaled
again. Softmax is computed in float32 or float64, whatever the type of the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NEVER = float(torch.finfo(torch.float32).min)
"""Start of a running maximum. It stands for -infinity, which export and storage may not keep."""


def widen(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is float64 already."""
    return x if x.dtype == torch.float64 else x.float()


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis, in float32 or float64."""
    return torch.softmax(widen(logits), dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
    """Softmax attention of each token to itself and all earlier tokens, `[B, H, T, D]`.

    window: how many of the newest tokens are attended to; 0 means all. Each head of k and v is
    shared by as many of the H heads of q.
    """
    k, v = share_heads(q, k), share_heads(q, v)
    if not window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    tokens = torch.arange(q.shape[2], device=q.device)
    before = tokens[:, None] - tokens  # how many tokens before the row's the column's is
    seen = (before >= 0) & (before < window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=1.0)


def share_heads(q: Tensor, shared: Tensor) -> Tensor:
    """Keys or values `[B, G, T, D]` with as many heads as q: each one is repeated."""
    heads, groups = q.shape[1], shared.shape[1]
    return shared if heads == groups else shared.repeat_interleave(heads // groups, dim=1)


def expectation(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The local expectation of a span: `[…, D]`, `[…, s, D]`, `[…, s, D]` to `[…, D]`.

    Attention over the span with a single query (arXiv 2107.05768, section 3.2).
    """
    weights = softmax((keys @ query.unsqueeze(-1)).squeeze(-1)).to(values.dtype)
    return (weights.unsqueeze(-2) @ values).squeeze(-2)


def cumulative_max(x: Tensor) -> Tensor:
    """Running maximum along the second-last axis: over each row and all rows before it."""
    length, reach = x.shape[-2], 1
    while reach < length:
        x = torch.cat((x[..., :reach, :], torch.maximum(x[..., reach:, :], x[..., :-reach, :])), -2)
        reach *= 2
    return x


def in_blocks(x: Tensor, span: int) -> Tensor:
    """Split `[B, H, T, D]` into `[B, H, blocks, span, D]`, with padding at the end."""
    batch, heads, length, dim = x.shape
    return F.pad(x, (0, 0, 0, -length % span)).view(batch, heads, -1, span, dim)


def future(length: int, device: torch.device) -> Tensor:
    """Mask `[length, length]` of future tokens: True where the column is after the row."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def push_and_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Push T tokens `[B, H, T, D]` onto stacks `[B, H, E, D]`, then attend to the valid entries.

    `lengths[B]` is the number of valid entries after the push. A token attends to itself and to the
    entries before it; with a `window`, only to that many of the newest. Heads of k, v and stacks
    may be fewer than those of q, see `share_heads`.
    """
    keys, values = push(keys, k, lengths), push(values, v, lengths)
    entries = torch.arange(keys.shape[2], device=q.device)
    newest = _newest(lengths, q.shape[2])[:, None, :, None]  # [B, 1, T, 1]
    hidden = entries > newest  # [B, 1, T, E]
    if window:
        hidden = hidden | (entries <= newest - window)
    logits = q @ share_heads(q, keys).transpose(-1, -2)
    weights = softmax(logits.masked_fill(hidden, float("-inf"))).to(values.dtype)
    return weights @ share_heads(q, values), keys, values


def push(stack: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
    """The stack `[B, H, E, D]` with `new[B, H, T, D]` as its last valid entries.

    `lengths[B]` is the number of valid entries after the push.
    """
    at = _newest(lengths, new.shape[2])
    rows = torch.arange(at.shape[0], device=at.device)[:, None]
    new = new.to(stack.dtype)  # the cache may have a smaller type than the computation
    return stack.transpose(1, 2).index_put((rows, at), new.transpose(1, 2)).transpose(1, 2)


def write(history: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    """The history `[B, L, …]` with `new[B, T, …]` at `positions[B, T]`."""
    rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
    return history.index_put((rows, positions), new.to(history.dtype))


def read(history: Tensor, indices: Tensor) -> Tensor:
    """Entries `[B, T, E, …]` of a history `[B, L, …]` at `indices[B, T, E]`, widened."""
    rows = torch.arange(indices.shape[0], device=indices.device)[:, None, None]
    return widen(history[rows, indices])


def attend(q: Tensor, keys: Tensor, values: Tensor, valid: Tensor) -> Tensor:
    """Attention of `q[B, H, T, D]` to those of the entries `[B, T, E, H, D]` that are valid.

    valid: `[B, T, E]`. Other entries may have any value, even NaN.
    """
    values = values.masked_fill(~valid[..., None, None], 0.0)
    keys, values = keys.permute(0, 3, 1, 2, 4), values.permute(0, 3, 1, 2, 4)
    logits = (keys @ q.unsqueeze(-1)).squeeze(-1)  # [B, H, T, E]
    weights = softmax(logits.masked_fill(~valid[:, None], float("-inf"))).to(values.dtype)
    return (weights.unsqueeze(-2) @ values).squeeze(-2)


def _newest(lengths: Tensor, count: int) -> Tensor:
    """Indices of the last `count` valid entries, `[B, count]`."""
    return lengths.long()[:, None] - count + torch.arange(count, device=lengths.device)
