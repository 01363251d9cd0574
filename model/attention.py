"""Causal attention, parallel over all positions and as push / attend / fold on an explicit stack.

Shapes: `B` batch, `H` heads, `T` tokens, `s` span, `n` blocks, `D` head_dim. Queries arrive already
divided by sqrt(D), as in the reference code, so pooled queries are never scaled again.
Softmax is computed in float32 or better, whatever the inputs are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of every token to itself and all earlier ones, `[B, H, T, D]`."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)


def fixed_attention(q: Tensor, k: Tensor, v: Tensor, span: int) -> Tensor:
    """Combiner-Fixed for all positions at once, `[B, H, T, D]`, any T; cost T (s + T/s).

    Token i attends, in one softmax, to the raw tokens of its own block up to itself and to one
    summary of every earlier block (arXiv 2107.05768, eq. 9 and 10, with block 0 included).
    """
    batch, heads, length, dim = q.shape
    blocks = -(-length // span)
    padding = (0, 0, 0, blocks * span - length)
    grid = (batch, heads, blocks, span, dim)
    qb, kb, vb = (F.pad(x, padding).view(grid) for x in (q, k, v))

    # The last block is never summarised: no token follows it. Padding lies there alone.
    summary_k, summary_v = summarise(
        qb[:, :, :-1].amax(dim=3), kb[:, :, :-1], vb[:, :, :-1]
    )  # [B, H, n-1, D]
    local = qb @ kb.transpose(-1, -2)  # [B, H, n, s, s]
    local = local.masked_fill(_future(span, q.device), float("-inf"))
    if blocks == 1:
        return (_softmax(local).to(v.dtype) @ vb).view(batch, heads, -1, dim)[:, :, :length]
    far = qb.flatten(2, 3) @ summary_k.transpose(-1, -2)  # [B, H, n*s, n-1]
    far = far.view(batch, heads, blocks, span, blocks - 1)
    far = far.masked_fill(_not_yet_closed(blocks, q.device), float("-inf"))
    weights = _softmax(torch.cat((local, far), dim=-1)).to(v.dtype)  # eq. 9: one normaliser
    near_out = weights[..., :span] @ vb
    far_out = weights[..., span:].reshape(batch, heads, blocks * span, -1) @ summary_v
    out = near_out.flatten(2, 3) + far_out
    return out[:, :, :length]


def summarise(query_max: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Summary of complete blocks: `[…, D]`, `[…, s, D]`, `[…, s, D]` to two `[…, D]`.

    Key: elementwise max of the keys. Value: attention over the block with the elementwise max of
    the block's queries as its query (arXiv 2107.05768, section 3.2).
    """
    weights = _softmax((keys @ query_max.unsqueeze(-1)).squeeze(-1)).to(values.dtype)
    return keys.amax(dim=-2), (weights.unsqueeze(-2) @ values).squeeze(-2)


def attend(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Attention of new tokens to a stack that already holds them: the decode kernel.

    `q` is `[B, H, t, D]`; `keys` and `values` are `[B, H, entries, D]`, of which the first
    `lengths[b]` are valid, the last t of them belonging to the new tokens, oldest first.
    """
    entries = torch.arange(keys.shape[2], device=q.device)
    newest = lengths[:, None] - q.shape[2] + torch.arange(q.shape[2], device=q.device)  # [B, t]
    hidden = entries > newest[:, None, :, None]  # [B, 1, t, entries]
    logits = (q @ keys.transpose(-1, -2)).masked_fill(hidden, float("-inf"))
    return _softmax(logits).to(values.dtype) @ values


def _softmax(logits: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.softmax(wide, dim=-1)


def _future(span: int, device: torch.device) -> Tensor:
    return torch.ones(span, span, dtype=torch.bool, device=device).triu(1)


def _not_yet_closed(blocks: int, device: torch.device) -> Tensor:
    own = torch.arange(blocks, device=device)[:, None, None]
    return torch.arange(blocks - 1, device=device) >= own  # [n, 1, n-1]
