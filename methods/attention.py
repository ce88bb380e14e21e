"""Attention over decided tokens and drafts under a tree mask.

Letters: B batch, n tokens, H query heads, G key-value heads, S slots, d head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def visible(
    ancestors: Tensor | None,
    *,
    n: int,
    shared: int,
    length: int,
    scratch: int,
    device: torch.device,
) -> Tensor | None:
    """Spell out which slots each new token sees, once for every layer.

    ancestors: [n, depth] scratch slots of each token's path, then -1; None for reading in order:
    every earlier slot and itself. shared: H / G. Returns [H / G * n, length + scratch + n] bool,
    all tokens for one head, then for the next; None where every slot is seen.
    """
    if n == 1 and (ancestors is None or scratch == 0):
        return None  # plain decoding must not pay for a mask
    if ancestors is None:
        seen = torch.ones(n, length + scratch + n, dtype=torch.bool, device=device)
        seen = seen.tril(length + scratch)
    else:
        slots = torch.arange(scratch + n, device=device)
        drafted = (ancestors[:, :, None] == slots).any(dim=1)
        seen = torch.cat([drafted.new_ones(n, length), drafted], dim=1)
    return seen if shared == 1 else seen.repeat(shared, 1)


def attend(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
    """Grouped-query attention. queries: [B, H, n, d]; keys, values: [B, G, S, d] -> [B, n, H * d].

    seen: bool, as `visible` gives it. The H / G queries that share a key head are laid
    along the token dimension, so that keys and values are read once and never copied.
    """
    batch, heads, n, dim = queries.shape
    groups = keys.shape[1]
    folded = queries.reshape(batch, groups, heads // groups * n, dim)
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=seen)
    return out.reshape(batch, heads, n, dim).transpose(1, 2).reshape(batch, n, heads * dim)
