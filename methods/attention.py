"""Attention over decided tokens and drafts under a tree mask.

Letters: B batch, n tokens, H query heads, G key-value heads, S slots, d head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def visible(
    ancestors: Tensor | None, *, n: int, length: int, scratch: int, device: torch.device
) -> Tensor | None:
    """Spell out which slots each new token sees.

    ancestors: [n, depth] scratch slots of each token's path, then -1; None for reading in order:
    every earlier slot and itself. Returns [n, length + scratch + n] bool, or None where every slot
    is seen.
    """
    if n == 1 and (ancestors is None or scratch == 0):
        return None  # plain decoding must not pay for a mask
    if ancestors is None:
        return torch.ones(n, length + scratch + n, dtype=torch.bool, device=device).tril(
            length + scratch
        )
    slots = torch.arange(scratch + n, device=device)
    mask = (ancestors[:, :, None] == slots).any(dim=1)
    return torch.cat([mask.new_ones(n, length), mask], dim=1)


def attend(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
    """Grouped-query attention. queries: [B, H, n, d]; keys, values: [B, G, S, d] -> [B, n, H * d].

    seen: [n, S] bool as `visible` gives it. The H / G queries that share a key head are laid
    along the token dimension, so that keys and values are read once and never copied.
    """
    batch, heads, n, dim = queries.shape
    groups = keys.shape[1]
    shared = heads // groups
    folded = queries.reshape(batch, groups, shared * n, dim)
    mask = seen if seen is None or shared == 1 else seen.repeat(shared, 1)
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
    return out.reshape(batch, heads, n, dim).transpose(1, 2).reshape(batch, n, heads * dim)
