"""Attention of new tokens over decided ones and their own ancestors, bit-equal however read.

A node's result must not depend on whether it is read alone, in a chain or in a tree: greedy
speculation then gives the very tokens of plain decoding, near-ties included. So every sum runs in
an order that depends on positions alone:

- Keys are cut by position, not by slot, into steps of STEP. A step's maximum, sum and weighted
  values are made from nothing, whoever makes them.
- The steps of a split of SPLIT keys are merged one after another by online softmax (Milakov and
  Gimelshein 2018, arXiv 1805.02867), and all splits of a node are added in order of position,
  BATCH at once (split-K attention, "flash decoding"). Where a merge happens does not matter: in
  the program that made the steps, or in the one that adds the splits.
- Steps that end at or before `base` hold decided keys alone, the same for every node: nodes share
  tiles of ROWS rows there. From there on a node's keys are its own path: each node has a tile for
  itself, and gathers the keys of its ancestors from the scratch slots.
- A tile always has ROWS rows, so that one matrix instruction serves all; what pads it is dropped.

What a program leaves behind is a piece, as `methods.kernels.pieces` cuts them.

Letters: n new tokens, H query heads, G key-value heads, S slots, d head dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from methods.kernels import pieces
from methods.kernels.combine import STEP, combine, length_of, merge, walked
from methods.kernels.pieces import cut, longest_path, room, scale_of
from quant.block_float import BlockFloat
from quant.kernels.early import admit, await_earlier, early

SPLIT = tl.constexpr(pieces.SPLIT)
ROWS = tl.constexpr(64)
# A launch is fine up to so many programs of whole splits; beyond, pieces cost more than waits that
# are shared (H200, one node: 6.9 us for 8.7 after 512, 17.7 for 12.6 after 4,096).
FEW = 32
# Loads in flight and warps of a program.
STAGES = 3
WARPS = 4


@triton.jit
def _step(query, keys, values, seen, scale, PRECISION: tl.constexpr):
    """Maximum, sum and weighted values of STEP keys, of which one at least is seen.

    Scores are scaled after the maximum is taken off: a difference times a factor leaves the
    compiler no product and sum to contract in one caller and not in the other.
    """
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    top = tl.max(scores, axis=1)
    weights = tl.exp2((scores - top[:, None]) * scale)
    total = tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    return top, total, acc


@triton.jit
def _write(outs, place, real, top, total, acc, DIM: tl.constexpr):
    """Leave a tile's piece behind. place: [r], of each row."""
    tops, totals, sums = outs
    dim = tl.arange(0, DIM)
    tl.store(tops + place, top, mask=real)
    tl.store(totals + place, total, mask=real)
    tl.store(sums + place[:, None].to(tl.int64) * DIM + dim[None, :], acc, mask=real[:, None])


@triton.jit
def _ahead(cache, task, strides, GROUPS: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr):
    """Keys and values of a program's first step, [STEP, DIM] each, as far as they are decided."""
    program, shared_programs, tiles, nodes, base, decided = task
    stride_kind, stride_group, stride_slot = strides
    mine = program < shared_programs
    rest = program - shared_programs
    group = tl.where(mine, program // tiles, rest) % GROUPS
    own = decided + rest // (GROUPS * nodes) * STEP
    slot = tl.where(mine, program // (tiles * GROUPS) * SIZE, own) + tl.arange(0, STEP)
    there = slot < tl.where(mine, decided, base)
    tile = cache + group.to(tl.int64) * stride_group
    tile += slot[:, None] * stride_slot + tl.arange(0, DIM)[None, :]
    keys = tl.load(tile, mask=there[:, None], other=0.0)
    return keys, tl.load(tile + stride_kind, mask=there[:, None], other=0.0)


@triton.jit
def _share(
    tensors,
    first,
    task,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One piece, of SIZE keys at most, of one tile. Its rows count nodes, then a group's heads.

    first: keys and values of the piece's first step.
    """
    shared: tl.constexpr = HEADS // GROUPS
    queries, cache, outs, scale, stride_kind, stride_group, stride_slot = tensors
    program, tiles, nodes, decided = task
    group = program // tiles % GROUPS
    piece = program // (tiles * GROUPS)
    start = piece * SIZE
    end = tl.minimum(start + SIZE, decided)
    if start < end:
        row = program % tiles * ROWS + tl.arange(0, ROWS)
        real = row < nodes * shared
        place = row // shared * HEADS + group * shared + row % shared
        dim = tl.arange(0, DIM)
        tile = queries + place[:, None] * DIM + dim[None, :]
        query = tl.load(tile, mask=real[:, None], other=0.0)
        slot = start + tl.arange(0, STEP)
        tile = cache + group.to(tl.int64) * stride_group
        tile += slot[:, None] * stride_slot + dim[None, :]
        seen = tl.full([STEP], True, tl.int1)
        top, total, acc = _step(query, *first, seen, scale, PRECISION)
        if SIZE > STEP:
            for key in tl.range(STEP, end - start, STEP, num_stages=STAGES):
                keys = tl.load(tile + key * stride_slot)
                values = tl.load(tile + key * stride_slot + stride_kind)
                one = _step(query, keys, values, seen, scale, PRECISION)
                top, total, acc = merge((top, total, acc), one, scale)
        _write(outs, place + piece * nodes * HEADS, real, top, total, acc, DIM)


@triton.jit
def _own(
    tensors,
    first,
    ancestors,
    task,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The step from `start` on of one node, whose keys from `base` on lie at its ancestors.

    first: keys and values of the step's positions below `ready`.
    """
    queries, cache, outs, scale, stride_kind, stride_group, stride_slot = tensors
    nodes, node, group, start, base, end, piece, ready = task
    dim = tl.arange(0, DIM)
    position = start + tl.arange(0, STEP)
    seen = position < end
    slot = position
    if DEPTH > 0:
        drafted = seen & (position >= base)
        at = ancestors + node * DEPTH + position - base
        slot = tl.where(drafted, base + tl.load(at, mask=drafted, other=0), position)
    tile = cache + group.to(tl.int64) * stride_group
    tile += slot[:, None] * stride_slot + dim[None, :]
    keys, values = first
    there, later = (position < ready)[:, None], (seen & (position >= ready))[:, None]
    keys = tl.where(there, keys, tl.load(tile, mask=later, other=0.0))
    values = tl.where(there, values, tl.load(tile + stride_kind, mask=later, other=0.0))
    row = tl.arange(0, ROWS)
    real = row < HEADS // GROUPS
    place = node * HEADS + group * (HEADS // GROUPS) + row
    tile = queries + place[:, None] * DIM + dim[None, :]
    query = tl.load(tile, mask=real[:, None], other=0.0)
    top, total, acc = _step(query, keys, values, seen, scale, PRECISION)
    _write(outs, place + piece * nodes * HEADS, real, top, total, acc, DIM)


@triton.jit(do_not_specialize=["nodes", "scratch", "tiles", "shared_programs", "hop", "own_at"])
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
    shared_programs,
    hop,
    own_at,
    stride_kind,
    stride_group,
    stride_slot,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    DEPTH: tl.constexpr,
    PADDED: tl.constexpr,
    FINE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One piece of a shared tile, or each `hop`-th of one node's own steps.

    Shared tiles come first, since they take longest. own_at: where pieces of own steps begin; in a
    fine launch all lie by position.
    """
    admit(EARLY)
    # What is decided stands, see `early`: it is on its way before the kernel ahead has ended.
    program = tl.program_id(0)
    base = tl.load(base_at).to(tl.int32)
    decided = base // STEP * STEP
    size: tl.constexpr = STEP if FINE else SPLIT
    strides = (stride_kind, stride_group, stride_slot)
    share = (program, shared_programs, tiles, nodes, base, decided)
    keys, values = _ahead(cache, share, strides, GROUPS, DIM, size)
    await_earlier(EARLY)
    outs = (tops, totals, sums)
    tensors = (queries, cache, outs, scale, stride_kind, stride_group, stride_slot)
    if program < shared_programs:
        tile = (program, tiles, nodes, decided)
        _share(tensors, (keys, values), tile, HEADS, GROUPS, DIM, size, PRECISION, STAGES)
    else:
        rest = program - shared_programs
        node = rest // GROUPS % nodes
        # Counted here, so that no mask of the loop over keys waits for a load.
        end = base + length_of(ancestors, node, scratch, DEPTH, PADDED)
        first = rest // (GROUPS * nodes)
        for step in tl.range(first, (end - decided - 1) // STEP + 1, hop, num_stages=1):
            piece = decided // STEP + step if FINE else own_at + step
            start, ready = decided + step * STEP, base * (step == first)
            task = (nodes, node, rest % GROUPS, start, base, end, piece, ready)
            _own(tensors, (keys, values), ancestors, task, HEADS, GROUPS, DIM, DEPTH, PRECISION)


def attend(
    queries: Tensor,
    cache: Tensor,
    base: Tensor,
    scratch: int,
    *,
    ancestors: Tensor | None,
    digits: bool = False,
) -> Tensor | BlockFloat:
    """See `methods.fused.attend`."""
    nodes, heads, dim = queries.shape
    _, groups, capacity, _ = cache.shape
    tiles = triton.cdiv(nodes * heads // groups, ROWS.value)
    # Whatever is decided: it is known when the kernel is compiled.
    fine = triton.cdiv(capacity, SPLIT.value) * tiles * groups <= FEW
    parts = cut(
        *(tiles, groups, capacity),
        longest=longest_path(ancestors, scratch, nodes),
        fine_steps=capacity if fine else -1,
    )
    outs, scale = room(queries, parts), scale_of(dim)
    path = queries if ancestors is None else ancestors  # not read where none is given
    _partials[(parts.shared_programs + parts.hop * nodes * groups,)](
        *(queries, cache, base, path, *outs, scale),
        *(nodes, scratch, tiles, parts.shared_programs, parts.hop, parts.own_at),
        *cache.stride()[:3],
        HEADS=heads,
        GROUPS=groups,
        DIM=dim,
        **walked(ancestors),
        FINE=fine,
        PRECISION="ieee" if queries.dtype == torch.float32 else "tf32",
        STAGES=STAGES,
        num_warps=WARPS,
        enable_fp_fusion=False,
        **early(queries.device),
    )
    return combine(
        queries,
        outs,
        base,
        ancestors,
        scale=scale,
        scratch=scratch,
        parts=parts,
        digits=digits,
    )
