"""The next level of a draft tree from all paths of this one, and in the end the tree from them all.

Letters: K nodes of the next level and children of each, D hidden, d longest path, c nodes in all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from methods.expansion import Expansion, Level
from methods.kernels.best import ordered
from quant.kernels.early import admit, await_earlier, early

PIECE = tl.constexpr(1024)  # of a hidden vector, which many programs copy
# Nodes that one warp of `_prune` holds.
SHARE = 512
MOST_WARPS = 16


@triton.jit
def _ranked(score, real, rank, PADDED: tl.constexpr):
    """Find where the score of a rank is; the earliest of equals comes first."""
    place = tl.arange(0, PADDED)
    order = tl.where(real, ordered(score), -0x80000000)
    found = 0
    for _ in range(rank + 1):
        highest = tl.max(order, axis=0)
        found = tl.min(tl.where(order == highest, place, PADDED), axis=0)
        order = tl.where(place == found, -0x80000000, order)
    return found


@triton.jit
def _token(ids, kept, place, real, MAPPED: tl.constexpr):
    """Read tokens, as the target has them."""
    token = tl.load(ids + place, mask=real, other=0)
    if MAPPED:
        token = tl.load(kept + token, mask=real)
    return token


@triton.jit(do_not_specialize=["first", "column", "slot", "deep"])
def _expand(
    places,
    positions,
    scores,
    ancestors,
    output,
    logprobs,
    ids,
    kept,
    all_tokens,
    all_parents,
    all_scores,
    nodes,
    next_scores,
    next_hidden,
    next_ancestors,
    first,
    column,
    slot,
    deep,
    CHILDREN: tl.constexpr,
    PADDED: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    PADDED_DEEP: tl.constexpr,
    MAPPED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A piece of one node of the next level, which every program looks for by itself.

    nodes: [3, K], their tokens, positions and places.
    """
    admit(EARLY)
    await_earlier(EARLY)
    rank = tl.program_id(0)
    child = tl.arange(0, PADDED)
    real = child < CHILDREN
    path = tl.load(scores + child // K, mask=real) + tl.load(logprobs + child, mask=real)
    chosen = _ranked(path, real, rank, PADDED)
    parent = chosen // K
    part = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    hidden = tl.load(output + parent * D + part, mask=part < D)
    tl.store(next_hidden + rank * D + part, hidden, mask=part < D)
    if tl.program_id(1) == 0:
        tl.store(nodes + rank, _token(ids, kept, chosen, True, MAPPED))
        tl.store(nodes + K + rank, tl.load(positions + parent) + 1)
        tl.store(nodes + 2 * K + rank, first + chosen)
        score = tl.load(scores + parent) + tl.load(logprobs + chosen)
        tl.store(next_scores + rank, score)
        level = tl.arange(0, PADDED_DEEP)
        above = tl.load(ancestors + parent * deep + level, mask=level < deep)
        own = tl.where(level == column, slot + rank, above)
        tl.store(next_ancestors + rank * deep + level, own, mask=level < deep)
        if rank == 0:
            place = first + child
            tl.store(all_tokens + place, _token(ids, kept, child, real, MAPPED), mask=real)
            tl.store(all_parents + place, tl.load(places + child // K, mask=real), mask=real)
            tl.store(all_scores + place, path, mask=real)


@triton.jit(do_not_specialize=["count", "keep"])
def _prune(
    root,
    tokens,
    parents,
    scores,
    spots,
    tree_tokens,
    tree_parents,
    count,
    keep,
    PADDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Find the score that exactly the best reach, by bisection; then put those in their order."""
    admit(EARLY)
    await_earlier(EARLY)
    node = tl.arange(0, PADDED)
    real = node < count
    order = ordered(tl.load(scores + node, mask=real, other=0.0))
    low = tl.min(tl.where(real, order, 0x7FFFFFFF), axis=0)
    order = tl.where(real, order, -0x80000000)
    high = tl.max(order, axis=0)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up; a sum could overflow
        enough = tl.sum((order >= middle).to(tl.int32), axis=0) >= keep
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    better = (order > low).to(tl.int32)
    equal = (order == low).to(tl.int32)
    earliest = tl.cumsum(equal, axis=0) <= keep - tl.sum(better, axis=0)
    kept = (better > 0) | ((equal > 0) & earliest)
    spot = tl.cumsum(kept.to(tl.int32), axis=0)
    tl.store(spots + node, spot, mask=kept)
    tl.debug_barrier()  # a node's parent has its spot from another thread
    parent = tl.load(parents + node, mask=kept, other=-1)
    below = tl.load(spots + parent, mask=kept & (parent >= 0), other=0)
    token = tl.load(tokens + node, mask=kept)
    tl.store(tree_tokens + spot, token, mask=kept)
    tl.store(tree_parents + spot, below, mask=kept)
    tl.store(tree_tokens, tl.load(root))
    tl.store(tree_parents, -1)


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
    """See `methods.fused.expand`."""
    assert logprobs.is_contiguous()
    assert ids.is_contiguous()
    assert level.ancestors.is_contiguous()
    k, width, deep = logprobs.shape[1], output.shape[1], level.ancestors.shape[1]
    nodes = torch.empty(3, k, dtype=torch.int64, device=output.device)
    following = Level(
        tokens=nodes[0],
        positions=nodes[1],
        places=nodes[2],
        scores=torch.empty(k, dtype=torch.float32, device=output.device),
        hidden=output.new_empty(k, width),
        ancestors=torch.empty(k, deep, dtype=torch.int32, device=output.device),
    )
    _expand[(k, triton.cdiv(width, PIECE.value))](
        level.places,
        level.positions,
        level.scores,
        level.ancestors,
        output.contiguous(),
        logprobs,
        ids,
        ids if kept is None else kept,  # not read where none is given
        expansion.tokens,
        expansion.parents,
        expansion.scores,
        nodes,
        following.scores,
        following.hidden,
        following.ancestors,
        first,
        column,
        slot,
        deep,
        CHILDREN=logprobs.numel(),
        PADDED=triton.next_power_of_2(logprobs.numel()),
        K=k,
        D=width,
        PADDED_DEEP=triton.next_power_of_2(deep),
        MAPPED=kept is not None,
        num_warps=1,
        **early(output.device),
    )
    return following


def prune(root: Tensor, expansion: Expansion, *, keep: int) -> tuple[Tensor, Tensor]:
    """See `methods.fused.prune`."""
    count = len(expansion.tokens)
    padded = triton.next_power_of_2(count)
    spots = torch.empty(count, dtype=torch.int32, device=root.device)
    tokens, parents = torch.empty(2, 1 + keep, dtype=torch.int64, device=root.device)
    _prune[(1,)](
        root,
        expansion.tokens,
        expansion.parents,
        expansion.scores,
        spots,
        tokens,
        parents,
        count,
        keep,
        PADDED=padded,
        num_warps=min(max(padded // SHARE, 1), MOST_WARPS),
        **early(root.device),
    )
    return tokens, parents
