"""A tree's relations from its parents, and the walk down what was picked.

Letters: n nodes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.early import admit, await_earlier, early


@triton.jit
def _ancestry(
    parents,
    mask,
    depths,
    ancestors,
    nodes,
    LEVELS: tl.constexpr,
    PADDED_NODES: tl.constexpr,
    PADDED_LEVELS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Walk up from one node twice: for its depth, then to put each ancestor at its own."""
    admit(EARLY)
    await_earlier(EARLY)
    start = tl.program_id(0)
    column = tl.arange(0, PADDED_NODES)
    seen = column < 0
    level = tl.arange(0, PADDED_LEVELS)
    path = tl.full([PADDED_LEVELS], -1, tl.int32)
    depth = -1
    node = start.to(tl.int64)
    while node >= 0:
        seen = seen | (column == node)
        depth += 1
        node = tl.load(parents + node)
    tl.store(depths + start, depth)
    node = start.to(tl.int64)
    while node >= 0:
        path = tl.where(level == depth, node.to(tl.int32), path)
        depth -= 1
        node = tl.load(parents + node)
    tl.store(mask + start * nodes + column, seen, mask=column < nodes)
    tl.store(ancestors + start * LEVELS + level, path, mask=level < LEVELS)


@triton.jit
def _walk(tokens, parents, picked, path, nodes, PADDED: tl.constexpr, EARLY: tl.constexpr):
    """Step from the root to the child that was picked, while there is one."""
    admit(EARLY)
    await_earlier(EARLY)
    child = tl.arange(0, PADDED)
    real = child < nodes
    token = tl.load(tokens + child, mask=real, other=0)
    parent = tl.load(parents + child, mask=real, other=-2)
    visited = tl.zeros([PADDED], tl.int64)
    chosen = tl.zeros([PADDED], tl.int64)
    count = 0
    node = 0
    while node < nodes:
        pick = tl.load(picked + node)
        visited = tl.where(child == count, node, visited)
        chosen = tl.where(child == count, pick, chosen)
        count += 1
        right = real & (parent == node) & (token == pick)
        node = tl.min(tl.where(right, child, PADDED), axis=0)
    tl.store(path, count)
    tl.store(path + 1 + child, visited, mask=real)
    tl.store(path + 1 + nodes + child, chosen, mask=real)


def ancestry(parents: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `methods.fused.ancestry`."""
    n = len(parents)
    mask = torch.empty(n, n, dtype=torch.bool, device=parents.device)
    depths = torch.empty_like(parents)
    ancestors = torch.empty(n, levels, dtype=torch.int32, device=parents.device)
    _ancestry[(n,)](
        parents,
        mask,
        depths,
        ancestors,
        n,
        LEVELS=levels,
        PADDED_NODES=triton.next_power_of_2(n),
        PADDED_LEVELS=triton.next_power_of_2(levels),
        num_warps=1,
        **early(parents.device),
    )
    return mask, depths, ancestors


def walk(tokens: Tensor, parents: Tensor, picked: Tensor) -> Tensor:
    """See `methods.fused.walk`."""
    n = len(tokens)
    path = torch.empty(1 + 2 * n, dtype=torch.int64, device=tokens.device)
    padded = triton.next_power_of_2(n)
    _walk[(1,)](
        tokens, parents, picked, path, n, PADDED=padded, num_warps=1, **early(tokens.device)
    )
    return path
