"""What the kernels compute, in plain torch: the CPU's way, and what tests hold them to.

Letters as in `methods.fused`, whose functions these are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from methods import attention
from methods.expansion import Expansion, Level
from methods.rope import rotate
from quant.block_float import BlockFloat, round_blocks
from quant.grid import Tokens, round_tokens


def attend(
    queries: Tensor,
    cache: Tensor,
    base: Tensor,
    scratch: int,
    *,
    ancestors: Tensor | None,
    digits: bool,
) -> Tensor | BlockFloat:
    """Attend with a dense mask."""
    n, heads, _ = queries.shape
    length, shared = int(base), heads // cache.shape[1]
    seen = attention.visible(
        ancestors, n=n, shared=shared, length=length, scratch=scratch, device=queries.device
    )
    keys, values = cache[:, None, :, : length + scratch + n]
    mixed = attention.attend(queries.transpose(0, 1)[None], keys, values, seen)[0]
    return round_blocks(mixed) if digits else mixed


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cache: Tensor,
    base: Tensor,
    scratch: int,
    *,
    norm: Tensor | None,
    eps: float,
    bias: Tensor | None,
) -> Tensor:
    """Do it by methods.rope.rotate and an indexed copy."""
    n = len(qkv)
    _, groups, _, dim = cache.shape
    heads = qkv.shape[1] // dim - 2 * groups
    fused = (qkv if bias is None else qkv + bias).view(n, -1, dim).transpose(0, 1)
    turning = fused[: heads + groups]
    if norm is not None:
        turning = F.rms_norm(turning, (dim,), None, eps) * norm
    turned = rotate(turning, (cos[positions], sin[positions]))
    slots = base + scratch + torch.arange(n, device=qkv.device)
    cache[0].index_copy_(1, slots, turned[heads:])
    cache[1].index_copy_(1, slots, fused[heads + groups :])
    return turned[:heads].transpose(0, 1).contiguous()


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, digits: bool
) -> tuple[Tensor | BlockFloat, Tensor]:
    """Add, then norm."""
    normed, summed = _add_norm(x, residual, weight, eps)
    return round_blocks(normed) if digits else normed, summed


def add_norm_round(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tokens, Tensor]:
    """Add, norm, then round each token."""
    normed, summed = _add_norm(x, residual, weight, eps)
    return round_tokens(normed), summed


def silu_mul(gate_up: Tensor, *, digits: bool) -> Tensor | BlockFloat:
    """Gate the second half by the first."""
    gate, up = gate_up.chunk(2, dim=-1)
    gated = F.silu(gate) * up
    return round_blocks(gated) if digits else gated


def best(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Take the best by topk, which knows no order of equals, and put equals in order."""
    logits = logits.float()
    values, ids = logits.topk(k, dim=-1)
    if int((logits >= values[:, -1:]).sum()) > values.numel():  # equals of the last were left out
        ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    else:
        ids = ids.sort(dim=-1).values
        order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices
        ids = ids.gather(-1, order)
    return logits.log_softmax(dim=-1).clamp(max=0).gather(-1, ids), ids


def argmax(logits: Tensor) -> Tensor:
    """Take the first of the best."""
    return logits.argmax(dim=-1)


def expand(
    level: Level,
    expansion: Expansion,
    output: Tensor,
    logprobs: Tensor,
    ids: Tensor,
    kept: Tensor | None,
    *,
    first: int,
    column: int,
    slot: int,
) -> Level:
    """Sort all paths, and take what belongs to the best by index."""
    k = logprobs.shape[1]
    paths = (level.scores[:, None] + logprobs).flatten()
    tokens = (ids if kept is None else kept[ids]).flatten()
    here = slice(first, first + len(paths))
    expansion.tokens[here] = tokens
    expansion.parents[here] = level.places.repeat_interleave(k)
    expansion.scores[here] = paths
    chosen = paths.sort(descending=True, stable=True).indices[:k]
    parents = chosen // k
    ancestors = level.ancestors[parents]
    # As a slice, since nothing has a place behind the longest path.
    ancestors[:, column : column + 1] = slot + torch.arange(k, device=ids.device)[:, None]
    return Level(
        tokens=tokens[chosen],
        positions=level.positions[parents] + 1,
        places=first + chosen,
        scores=paths[chosen],
        hidden=output[parents],
        ancestors=ancestors,
    )


def prune(root: Tensor, expansion: Expansion, *, keep: int) -> tuple[Tensor, Tensor]:
    """Sort all nodes, and number the best anew."""
    order = expansion.scores.sort(descending=True, stable=True).indices[:keep]
    kept = order.sort().values
    place = root.new_zeros(len(expansion.tokens) + 1)
    place[kept] = torch.arange(1, len(kept) + 1, device=root.device)
    # Node -1, the root, indexes the last entry of `place`, which stays 0.
    return (
        torch.cat([root, expansion.tokens[kept]]),
        torch.cat([torch.full_like(root, -1), place[expansion.parents[kept]]]),
    )


def ancestry(parents: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Walk up from all nodes at once."""
    n = len(parents)
    if n == 1:  # plain decoding must not pay for a walk
        paths = torch.full((1, levels), -1, dtype=torch.int32, device=parents.device)
        paths[:, 0] = 0
        return parents[:, None] < 0, parents + 1, paths
    above = [torch.arange(n, device=parents.device)]
    while bool((above[-1] >= 0).any()):
        # Node -1, above the root, indexes the last entry and must stay where it is.
        above.append(torch.where(above[-1] >= 0, parents[above[-1]], -1))
    up = torch.stack(above[:-1], dim=1)  # itself first
    depths = (up >= 0).sum(dim=1) - 1
    mask = (up[:, :, None] == above[0]).any(dim=1)
    steps = depths[:, None] - torch.arange(levels, device=parents.device)
    paths = up.gather(1, steps.clamp(min=0)).where(steps >= 0, -1)
    return mask, depths, paths.to(torch.int32)


def walk(tokens: Tensor, parents: Tensor, picked: Tensor) -> Tensor:
    """Step down from the root to the child that was picked, while there is one."""
    n = len(tokens)
    if n == 1:
        return torch.cat([picked.new_tensor([1, 0]), picked])
    path = [0]
    while True:
        right = (parents == path[-1]) & (tokens == picked[path[-1]])
        if not bool(right.any()):
            break
        path.append(int(right.nonzero()[0]))
    nodes = torch.tensor(path, device=tokens.device)
    out = tokens.new_zeros(1 + 2 * n)
    out[0] = len(path)
    out[1 : 1 + len(path)] = nodes
    out[1 + n : 1 + n + len(path)] = picked[nodes]
    return out


def commit(caches: Tensor, base: Tensor, nodes: Tensor, count: Tensor) -> None:
    """Copy the kept slots by one indexed read."""
    kept = nodes[: int(count)]
    start = base + torch.arange(len(kept), device=nodes.device)
    caches[:, :, :, start] = caches[:, :, :, base + kept]


def _add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    summed = x if residual is None else x + residual
    return F.rms_norm(summed, weight.shape, weight, eps), summed
