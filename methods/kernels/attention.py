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

What a program leaves behind is a piece. Of decided keys that is one step where the launch is small
(`fine`), so that many programs share the wait for memory, and else all of a split that is decided,
so that pieces cost little traffic. Of own keys it is always one step.

Letters: n new tokens, H query heads, G key-value heads, S slots, d head dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.early import admit, await_earlier, early

SPLIT = tl.constexpr(256)
STEP = tl.constexpr(64)
STEPS = tl.constexpr(4)  # of a split
ROWS = tl.constexpr(64)
# Splits that are added at once.
BATCH = tl.constexpr(8)
# A launch is fine up to so many programs of whole splits; beyond, pieces cost more than waits that
# are shared (H200, one node: 6.9 us for 8.7 after 512, 17.7 for 12.6 after 4,096).
FEW = 32
# Loads in flight and warps of a program; warps that add one head's splits: 4 of them took 10 us
# more at 60 nodes.
STAGES = 3
WARPS = 4
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
def _weight(top, highest, scale):
    """What a sum under the maximum `top` counts under `highest`: nothing where nothing was seen."""
    return tl.where(top == float("-inf"), 0.0, tl.exp2((top - highest) * scale))


@triton.jit
def _merge(so_far, later, scale):
    """Add a later step to what came before it: [r], [r], [r, d] each. Exact if one is nothing."""
    top, total, acc = so_far
    later_top, later_total, later_acc = later
    highest = tl.maximum(top, later_top)
    kept = _weight(top, highest, scale)
    added = _weight(later_top, highest, scale)
    total = tl.fma(total, kept, later_total * added)
    wide = tl.broadcast_to(kept[:, None], acc.shape)
    acc = tl.fma(acc, wide, later_acc * added[:, None])
    return highest, total, acc


@triton.jit
def _write(outs, place, real, top, total, acc, DIM: tl.constexpr):
    """Leave a tile's piece behind. place: [r], of each row."""
    tops, totals, sums = outs
    dim = tl.arange(0, DIM)
    tl.store(tops + place, top, mask=real)
    tl.store(totals + place, total, mask=real)
    tl.store(sums + place[:, None].to(tl.int64) * DIM + dim[None, :], acc, mask=real[:, None])


@triton.jit
def _read(outs, place, there, DIM: tl.constexpr):
    """Pieces of one row, nothing where none is there. place: [r]."""
    tops, totals, sums = outs
    dim = tl.arange(0, DIM)
    top = tl.load(tops + place, mask=there, other=float("-inf"))
    total = tl.load(totals + place, mask=there, other=0.0)
    tile = sums + place[:, None].to(tl.int64) * DIM + dim[None, :]
    return top, total, tl.load(tile, mask=there[:, None], other=0.0)


@triton.jit
def _share(
    tensors,
    task,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One piece, of SIZE keys at most, of one tile. Its rows count nodes, then a group's heads."""
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
        if SIZE == STEP:
            keys, values = tl.load(tile), tl.load(tile + stride_kind)
            top, total, acc = _step(query, keys, values, seen, scale, PRECISION)
        else:
            top = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, DIM], tl.float32)
            for key in tl.range(0, end - start, STEP, num_stages=STAGES):
                keys = tl.load(tile + key * stride_slot)
                values = tl.load(tile + key * stride_slot + stride_kind)
                one = _step(query, keys, values, seen, scale, PRECISION)
                top, total, acc = _merge((top, total, acc), one, scale)
        _write(outs, place + piece * nodes * HEADS, real, top, total, acc, DIM)


@triton.jit
def _own(
    tensors,
    ancestors,
    task,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The step from `start` on of one node, whose keys from `base` on lie at its ancestors."""
    queries, cache, outs, scale, stride_kind, stride_group, stride_slot = tensors
    nodes, node, group, start, base, end, piece = task
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
    keys = tl.load(tile, mask=seen[:, None], other=0.0)
    values = tl.load(tile + stride_kind, mask=seen[:, None], other=0.0)
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
    await_earlier(EARLY)
    outs = (tops, totals, sums)
    tensors = (queries, cache, outs, scale, stride_kind, stride_group, stride_slot)
    program = tl.program_id(0)
    base = tl.load(base_at).to(tl.int32)
    decided = base // STEP * STEP
    if program < shared_programs:
        size: tl.constexpr = STEP if FINE else SPLIT
        tile = (program, tiles, nodes, decided)
        _share(tensors, tile, HEADS, GROUPS, DIM, size, PRECISION, STAGES)
    else:
        rest = program - shared_programs
        node = rest // GROUPS % nodes
        # Counted here, so that no mask of the loop over keys waits for a load.
        end = base + _length(ancestors, node, scratch, DEPTH, PADDED)
        first = rest // (GROUPS * nodes)
        for step in tl.range(first, (end - decided - 1) // STEP + 1, hop, num_stages=1):
            piece = decided // STEP + step if FINE else own_at + step
            task = (nodes, node, rest % GROUPS, decided + step * STEP, base, end, piece)
            _own(tensors, ancestors, task, HEADS, GROUPS, DIM, DEPTH, PRECISION)


@triton.jit
def _fine_splits(outs, first, rows, row, pieces, count, scale, DIM: tl.constexpr):
    """Splits first .. first + BATCH of one row, whose steps are pieces each.

    All loads begin before any is waited for, that of the length too: what lies behind `count` is
    read as well, from memory that nobody wrote, and dropped.
    """
    tl.static_assert(STEPS == 4)
    step = (first + tl.arange(0, BATCH)) * STEPS
    place = step * rows + row
    one = _read(outs, place, step < pieces, DIM)
    two = _read(outs, place + rows, step + 1 < pieces, DIM)
    three = _read(outs, place + 2 * rows, step + 2 < pieces, DIM)
    four = _read(outs, place + 3 * rows, step + 3 < pieces, DIM)
    merged = _merge(_drop(one, step < count), _drop(two, step + 1 < count), scale)
    merged = _merge(merged, _drop(three, step + 2 < count), scale)
    return _merge(merged, _drop(four, step + 3 < count), scale)


@triton.jit
def _drop(piece, there):
    """A piece, or nothing where none is there."""
    top, total, acc = piece
    top = tl.where(there, top, float("-inf"))
    return top, tl.where(there, total, 0.0), tl.where(there[:, None], acc, 0.0)


@triton.jit
def _coarse_splits(outs, first, rows, row, own_at, decided, count, scale, DIM: tl.constexpr):
    """The same where decided steps [0, decided) are merged already: a split's are one piece."""
    split = first + tl.arange(0, BATCH)
    there = split * STEPS < decided
    top, total, acc = _read(outs, split * rows + row, there, DIM)
    own = tl.maximum(first * STEPS, decided)
    for step in range(own, tl.minimum((first + BATCH) * STEPS, count)):
        # A load of one piece by all rows of the tile; rows of other splits add nothing.
        place = tl.zeros([BATCH], tl.int32) + (own_at + step - decided) * rows + row
        here = split == step // STEPS
        one = _read(outs, place, here, DIM)
        top, total, acc = _merge((top, total, acc), one, scale)
    return top, total, acc


@triton.jit
def _add(top, total, acc, splits, scale, DIM: tl.constexpr):
    """Add BATCH splits to one row's running maximum, sum and weighted values."""
    tops, totals, sums = splits
    highest = tl.maximum(top, tl.max(tops, axis=0))
    shrink = tl.exp2((top - highest) * scale)
    weights = tl.exp2((tops - highest) * scale)
    total = tl.fma(total, shrink, tl.sum(weights * totals, axis=0))
    wide = shrink + tl.zeros([DIM], tl.float32)
    acc = tl.fma(acc, wide, tl.sum(weights[:, None] * sums, axis=0))
    return highest, total, acc


@triton.jit(do_not_specialize=["nodes", "scratch", "pieces", "own_at"])
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
    pieces,
    own_at,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DEPTH: tl.constexpr,
    PADDED: tl.constexpr,
    FINE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Merge the steps of one node and head, and add its splits, in order of position."""
    admit(EARLY)
    await_earlier(EARLY)
    row = tl.program_id(0)
    rows, outs = nodes * HEADS, (tops, totals, sums)
    base = tl.load(base_at).to(tl.int32)
    length = _length(ancestors, row // HEADS, scratch, DEPTH, PADDED)
    decided = base // STEP
    count = (base + length - 1) // STEP + 1
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([DIM], tl.float32)
    if FINE:
        # Outside of the loop, whose condition would hold the first loads back.
        some = _fine_splits(outs, 0, rows, row, pieces, count, scale, DIM)
        top, total, acc = _add(top, total, acc, some, scale, DIM)
    for first in range(BATCH if FINE else 0, (count - 1) // STEPS + 1, BATCH):
        if FINE:
            some = _fine_splits(outs, first, rows, row, pieces, count, scale, DIM)
        else:
            some = _coarse_splits(outs, first, rows, row, own_at, decided, count, scale, DIM)
        top, total, acc = _add(top, total, acc, some, scale, DIM)
    tl.store(out + row * DIM + tl.arange(0, DIM), acc / total)


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
    own_steps = (STEP.value + (depth or scratch + nodes) - 2) // STEP.value + 1
    fine = splits * tiles * groups <= FEW
    shared = triton.cdiv(capacity, STEP.value) if fine else splits
    pieces = shared if fine else splits + own_steps
    hop = own_steps if fine else 1  # programs that share a node's own steps
    shared_programs = shared * tiles * groups
    scalars = queries.new_empty(2, pieces, nodes * heads, dtype=torch.float32)
    sums = queries.new_empty(pieces, nodes * heads, dim, dtype=torch.float32)
    scale = LOG2_E / dim**0.5
    path = queries if ancestors is None else ancestors  # not read where none is given
    padded = triton.next_power_of_2(depth or 1)
    sizes = {"HEADS": heads, "DIM": dim, "DEPTH": depth, "PADDED": padded, "FINE": fine}
    sizes |= early(queries.device)
    _partials[(shared_programs + hop * nodes * groups,)](
        *(queries, cache, base, path, *scalars, sums, scale),
        *(nodes, scratch, tiles, shared_programs, hop, splits),
        *cache.stride()[:3],
        **sizes,
        GROUPS=groups,
        PRECISION="ieee" if queries.dtype == torch.float32 else "tf32",
        STAGES=STAGES,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    out = torch.empty(nodes, heads * dim, dtype=queries.dtype, device=queries.device)
    _combine[(nodes * heads,)](
        *(base, path, *scalars, sums, out, scale, nodes, scratch, pieces, splits),
        **sizes,
        num_warps=COMBINE_WARPS,
        enable_fp_fusion=False,
    )
    return out
