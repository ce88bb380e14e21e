"""Attention of new tokens over decided ones and their own ancestors, bit-equal however read.

A node's result must not depend on whether it is read alone, in a chain or in a tree: greedy
speculation then gives the very tokens of plain decoding, near-ties included. So every sum runs in
an order that depends on positions alone:

- Keys are cut by position, not by slot, into splits of SPLIT; each split is folded in steps of
  STEP by online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) and all partial results
  of a node are added in order of position (split-K attention, "flash decoding").
- Splits that end at or before `base` hold decided keys alone, the same for every node: nodes share
  tiles of ROWS rows there. From there on a node's keys are its own path: each node has a tile for
  itself, and gathers the keys of its ancestors from the scratch slots.
- A tile always has ROWS rows, so that one matrix instruction serves all; what pads it is dropped.

Letters: n new tokens, H query heads, G key-value heads, S slots, d head dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.early import admit, await_earlier, early

SPLIT = tl.constexpr(256)
STEP = tl.constexpr(64)
ROWS = tl.constexpr(64)
# Partial results that are added at once.
BATCH = tl.constexpr(16)
# Loads in flight, and warps that add one head's splits: 4 of them took 10 us more at 60 nodes.
STAGES = 3
COMBINE_WARPS = 1
LOG2_E = 1.4426950408889634


@triton.jit
def _length(ancestors, node, scratch, DEPTH: tl.constexpr, PADDED: tl.constexpr):
    """Scratch slots that a node sees, itself included. DEPTH: 0 where all are read in order."""
    length = scratch + node + 1
    if DEPTH > 0:
        column = tl.arange(0, PADDED)
        row = tl.load(ancestors + node * DEPTH + column, mask=column < DEPTH, other=-1)
        length = tl.sum((row >= 0).to(tl.int32), axis=0)
    return length


@triton.jit
def _task(
    base,
    ancestors,
    nodes,
    scratch,
    tiles,
    own_programs,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
    DEPTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """What a program does: a group's keys [start, end) for the rows [first, rows) of a tile.

    First come the programs of single nodes, then those of shared tiles, whose splits must end at
    or before `base`. Rows count nodes, then the heads that share a group.
    """
    program = tl.program_id(0)
    if program < own_programs:
        node = program // GROUPS % nodes
        group = program % GROUPS
        start = (base // SPLIT + program // (GROUPS * nodes)) * SPLIT
        # Counted here, so that no mask of the loop over keys waits for a load.
        end = tl.minimum(start + SPLIT, base + _length(ancestors, node, scratch, DEPTH, PADDED))
        first = node * SHARED
        rows = first + SHARED
    else:
        rest = program - own_programs
        node = 0
        group = rest // tiles % GROUPS
        start = rest // (tiles * GROUPS) * SPLIT
        end = tl.where(start + SPLIT <= base, start + SPLIT, 0)
        first = rest % tiles * ROWS
        rows = nodes * SHARED
    return node, group, start, end, first, rows


@triton.jit
def _fold(query, keys, values, seen, top, total, acc, scale, PRECISION: tl.constexpr):
    """Add STEP keys to a tile's running maximum, sum and weighted values.

    Scores are scaled after the maximum is taken off: a difference times a factor leaves the
    compiler no product and sum to contract in one caller and not in the other.
    """
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, axis=1))
    shrink = tl.exp2((top - highest) * scale)
    weights = tl.exp2((scores - highest[:, None]) * scale)
    total = tl.fma(total, shrink, tl.sum(weights, axis=1))
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
    return highest, total, acc


@triton.jit(do_not_specialize=["nodes", "scratch", "tiles", "own_programs"])
def _partials(
    queries,
    cache,
    base_at,
    ancestors,
    tops,
    totals,
    sums,
    scale,
    nodes,
    scratch,
    tiles,
    own_programs,
    stride_kind,
    stride_group,
    stride_slot,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    DEPTH: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One split of one tile."""
    admit(EARLY)
    await_earlier(EARLY)
    shared: tl.constexpr = HEADS // GROUPS
    base = tl.load(base_at).to(tl.int32)
    node, group, start, end, first, rows = _task(
        base, ancestors, nodes, scratch, tiles, own_programs, GROUPS, shared, DEPTH, PADDED
    )
    if start >= end:
        return
    row = first + tl.arange(0, ROWS)
    real = row < rows
    place = row // shared * HEADS + group * shared + row % shared
    dim = tl.arange(0, DIM)
    query = tl.load(queries + place[:, None] * DIM + dim[None, :], mask=real[:, None], other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    cache += group.to(tl.int64) * stride_group
    for key in tl.range(start, end, STEP, num_stages=STAGES):
        position = key + tl.arange(0, STEP)
        seen = position < end
        slot = position
        if DEPTH > 0:
            drafted = seen & (position >= base)
            at = ancestors + node * DEPTH + position - base
            slot = tl.where(drafted, base + tl.load(at, mask=drafted, other=0), position)
        tile = cache + slot[:, None] * stride_slot + dim[None, :]
        keys = tl.load(tile, mask=seen[:, None], other=0.0)
        values = tl.load(tile + stride_kind, mask=seen[:, None], other=0.0)
        top, total, acc = _fold(query, keys, values, seen, top, total, acc, scale, PRECISION)
    place += start // SPLIT * nodes * HEADS
    tl.store(tops + place, top, mask=real)
    tl.store(totals + place, total, mask=real)
    tl.store(sums + place[:, None].to(tl.int64) * DIM + dim[None, :], acc, mask=real[:, None])


@triton.jit(do_not_specialize=["nodes", "scratch"])
def _combine(
    base_at,
    ancestors,
    tops,
    totals,
    sums,
    out,
    scale,
    nodes,
    scratch,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DEPTH: tl.constexpr,
    PADDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Add the splits of one node and head in order of position."""
    admit(EARLY)
    await_earlier(EARLY)
    row = tl.program_id(0)
    length = _length(ancestors, row // HEADS, scratch, DEPTH, PADDED)
    count = (tl.load(base_at).to(tl.int32) + length - 1) // SPLIT + 1
    dim = tl.arange(0, DIM)
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([DIM], tl.float32)
    for first in range(0, count, BATCH):
        split = first + tl.arange(0, BATCH)
        live = split < count
        place = split * nodes * HEADS + row
        tops_here = tl.load(tops + place, mask=live, other=float("-inf"))
        totals_here = tl.load(totals + place, mask=live, other=0.0)
        tile = sums + place[:, None].to(tl.int64) * DIM + dim[None, :]
        sums_here = tl.load(tile, mask=live[:, None], other=0.0)
        highest = tl.maximum(top, tl.max(tops_here, axis=0))
        shrink = tl.exp2((top - highest) * scale)
        weights = tl.exp2((tops_here - highest) * scale)
        total = tl.fma(total, shrink, tl.sum(weights * totals_here, axis=0))
        acc = tl.fma(
            acc, shrink + tl.zeros([DIM], tl.float32), tl.sum(weights[:, None] * sums_here, axis=0)
        )
        top = highest
    tl.store(out + row * DIM + dim, acc / total)


def attend(
    queries: Tensor,
    cache: Tensor,
    base: Tensor,
    scratch: int,
    *,
    ancestors: Tensor | None,
) -> Tensor:
    """See `methods.fused.attend`."""
    nodes, heads, dim = queries.shape
    _, groups, capacity, _ = cache.shape
    tiles = triton.cdiv(nodes * heads // groups, ROWS.value)
    depth = 0 if ancestors is None else ancestors.shape[1]
    splits = triton.cdiv(capacity, SPLIT.value)
    longest = depth or scratch + nodes
    own_splits = (SPLIT.value + longest - 2) // SPLIT.value + 1
    scalars = queries.new_empty(2, splits, nodes * heads, dtype=torch.float32)
    sums = queries.new_empty(splits, nodes * heads, dim, dtype=torch.float32)
    scale = LOG2_E / dim**0.5
    own_programs = own_splits * nodes * groups
    path = queries if ancestors is None else ancestors  # not read where none is given
    padded = triton.next_power_of_2(depth or 1)
    sizes = {"HEADS": heads, "DIM": dim, "DEPTH": depth, "PADDED": padded}
    sizes |= early(queries.device)
    _partials[(own_programs + splits * tiles * groups,)](
        queries,
        cache,
        base,
        path,
        *scalars,
        sums,
        scale,
        nodes,
        scratch,
        tiles,
        own_programs,
        *cache.stride()[:3],
        **sizes,
        GROUPS=groups,
        PRECISION="ieee" if queries.dtype == torch.float32 else "tf32",
        STAGES=STAGES,
        num_warps=4,
        enable_fp_fusion=False,
    )
    out = torch.empty(nodes, heads * dim, dtype=queries.dtype, device=queries.device)
    _combine[(nodes * heads,)](
        base,
        path,
        *scalars,
        sums,
        out,
        scale,
        nodes,
        scratch,
        **sizes,
        num_warps=COMBINE_WARPS,
        enable_fp_fusion=False,
    )
    return out
