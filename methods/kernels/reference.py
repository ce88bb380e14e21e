"""What the kernels compute, in plain torch: the CPU's way, and what tests hold them to.

Letters as in `methods.fused`, whose functions these are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from methods import attention
from methods.rope import rotate
from quant.grid import Tokens, round_tokens


def attend(
    queries: Tensor, cache: Tensor, base: Tensor, scratch: int, *, ancestors: Tensor | None
) -> Tensor:
    """Attend with a dense mask."""
    n = len(queries)
    length = int(base)
    if ancestors is None:
        mask = torch.ones(n, scratch + n, dtype=torch.bool, device=queries.device).tril(scratch)
    else:
        slots = torch.arange(scratch + n, device=queries.device)
        mask = (ancestors[:, :, None] == slots).any(dim=1)
    seen = torch.cat([mask.new_ones(n, length), mask], dim=1)
    keys, values = cache[:, None, :, : length + scratch + n]
    return attention.attend(queries.transpose(0, 1)[None], keys, values, seen)[0]


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
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add, then norm."""
    summed = x if residual is None else x + residual
    return F.rms_norm(summed, weight.shape, weight, eps), summed


def add_norm_round(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tokens, Tensor]:
    """Add, norm, then round each token."""
    normed, summed = add_norm(x, residual, weight, eps)
    return round_tokens(normed), summed


def silu_mul(gate_up: Tensor) -> Tensor:
    """Gate the second half by the first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def best(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sort all; a stable sort keeps the earliest of equals first."""
    logits = logits.float()
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return logits.log_softmax(dim=-1).clamp(max=0).gather(-1, ids), ids


def argmax(logits: Tensor) -> Tensor:
    """Take the first of the best."""
    return logits.argmax(dim=-1)


def ancestry(parents: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Walk up from every node."""
    n = len(parents)
    mask = torch.zeros(n, n, dtype=torch.bool)
    ancestors = torch.full((n, levels), -1, dtype=torch.int32)
    above = parents.tolist()
    for node in range(n):
        path = [node]
        while above[path[-1]] >= 0:
            path.append(above[path[-1]])
        mask[node, path] = True
        ancestors[node, : len(path)] = torch.tensor(path[::-1], dtype=torch.int32)
    depths = mask.sum(dim=1) - 1
    return mask.to(parents.device), depths.to(parents.device), ancestors.to(parents.device)


def walk(tokens: Tensor, parents: Tensor, picked: Tensor) -> Tensor:
    """Step down from the root to the child that was picked, while there is one."""
    n = len(tokens)
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
