"""The last part of attention: a node's pieces, merged and added in order of position.

What pieces are, and why their order matters, is told in `methods.kernels.attention`, whose letters
these are.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from methods.kernels import pieces
from methods.kernels.pieces import Cut
from quant import block_float
from quant.block_float import BlockFloat
from quant.kernels.blocks_triton import WIDTH as DIGITS
from quant.kernels.blocks_triton import round_blocks, store_digits
from quant.kernels.early import admit, await_earlier, early

STEP = tl.constexpr(pieces.STEP)
STEPS = tl.constexpr(pieces.STEPS)
# Splits that are added at once.
BATCH = tl.constexpr(8)
# Warps that add one head's splits: 4 of them took 10 us more at 60 nodes.
WARPS = 1


@triton.jit
def length_of(ancestors, node, scratch, DEPTH: tl.constexpr, PADDED: tl.constexpr):
    """Scratch slots that a node sees, itself included. DEPTH: 0 where all are read in order."""
    length = scratch + node + 1
    if DEPTH > 0:
        column = tl.arange(0, PADDED)
        row = tl.load(ancestors + node * DEPTH + column, mask=column < DEPTH, other=-1)
        length = tl.sum((row >= 0).to(tl.int32), axis=0)
    return length


@triton.jit
def _weight(top, highest, scale):
    """What a sum under the maximum `top` counts under `highest`: nothing where nothing was seen."""
    return tl.where(top == float("-inf"), 0.0, tl.exp2((top - highest) * scale))


@triton.jit
def merge(so_far, later, scale):
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
def _read(outs, place, there, DIM: tl.constexpr):
    """Pieces of one row, nothing where none is there. place: [r]."""
    tops, totals, sums = outs
    dim = tl.arange(0, DIM)
    top = tl.load(tops + place, mask=there, other=float("-inf"))
    total = tl.load(totals + place, mask=there, other=0.0)
    tile = sums + place[:, None].to(tl.int64) * DIM + dim[None, :]
    return top, total, tl.load(tile, mask=there[:, None], other=0.0)


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
    merged = merge(_drop(one, step < count), _drop(two, step + 1 < count), scale)
    merged = merge(merged, _drop(three, step + 2 < count), scale)
    return merge(merged, _drop(four, step + 3 < count), scale)


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
        top, total, acc = merge((top, total, acc), one, scale)
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


@triton.jit(do_not_specialize=["nodes", "room", "scratch", "pieces", "own_at", "fine_steps"])
def _combine(
    queries,
    base_at,
    ancestors,
    tops,
    totals,
    sums,
    out,
    scales,
    scale,
    nodes,
    room,
    scratch,
    pieces,
    own_at,
    fine_steps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DEPTH: tl.constexpr,
    PADDED: tl.constexpr,
    MIXED: tl.constexpr,
    ROUNDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Merge the steps of one node and head, and add its splits, in order of position.

    MIXED: whether pieces are fine up to `fine_steps` decided steps; else they never are.
    ROUNDED: to digits, with scales, a head being one block; else scales and room are not looked at.
    """
    admit(EARLY)
    base = tl.load(base_at).to(tl.int32)  # how much is decided stands, see `early`
    await_earlier(EARLY)
    row = tl.program_id(0)
    rows, outs = nodes * HEADS, (tops, totals, sums)
    length = length_of(ancestors, row // HEADS, scratch, DEPTH, PADDED)
    decided = base // STEP
    count = (base + length - 1) // STEP + 1
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([DIM], tl.float32)
    splits = (count - 1) // STEPS + 1
    coarse_from = splits * 0
    if MIXED:  # noqa: SIM102  compiled or not
        if decided <= fine_steps:
            # Outside of the loop, whose condition would hold the first loads back.
            some = _fine_splits(outs, 0, rows, row, pieces, count, scale, DIM)
            top, total, acc = _add(top, total, acc, some, scale, DIM)
            for first in range(BATCH, splits, BATCH):
                some = _fine_splits(outs, first, rows, row, pieces, count, scale, DIM)
                top, total, acc = _add(top, total, acc, some, scale, DIM)
            coarse_from = splits
    for first in range(coarse_from, splits, BATCH):
        some = _coarse_splits(outs, first, rows, row, own_at, decided, count, scale, DIM)
        top, total, acc = _add(top, total, acc, some, scale, DIM)
    if ROUNDED:
        mixed = (acc / total).to(queries.dtype.element_ty).to(tl.float32)
        node, head = row // HEADS, row % HEADS
        store_digits(mixed[None, :], out, scales, node, head, nodes, room, HEADS)
    else:
        tl.store(out + row * DIM + tl.arange(0, DIM), acc / total)


def walked(ancestors: Tensor | None) -> dict[str, int]:
    """What kernels that count a node's path must know of it. ancestors: [n, depth] or None."""
    depth = 0 if ancestors is None else ancestors.shape[1]
    return {"DEPTH": depth, "PADDED": triton.next_power_of_2(depth or 1)}


def combine(
    queries: Tensor,
    made_of: Sequence[Tensor],
    base: Tensor,
    ancestors: Tensor | None,
    *,
    scale: float,
    scratch: int,
    parts: Cut,
    digits: bool,
) -> Tensor | BlockFloat:
    """Make of all pieces what `methods.fused.attend` gives.

    made_of: maxima, sums [pieces, n * H] and weighted values [pieces, n * H, d].
    """
    nodes, heads, dim = queries.shape
    path = queries if ancestors is None else ancestors  # not read where none is given
    fits = digits and dim == DIGITS.value
    made: Tensor | BlockFloat
    if fits:
        out, scales = made = block_float.empty(nodes, heads * dim, queries.device)
    else:
        out = scales = made = queries.new_empty(nodes, heads * dim)
    _combine[(nodes * heads,)](
        *(queries, base, path, *made_of, out, scales, scale),
        *(nodes, scales.shape[1], scratch, parts.pieces, parts.own_at, parts.fine_steps),
        HEADS=heads,
        DIM=dim,
        **walked(ancestors),
        MIXED=parts.fine_steps >= 0,
        ROUNDED=fits,
        num_warps=WARPS,
        enable_fp_fusion=False,
        **early(queries.device),
    )
    return round_blocks(out) if digits and not fits else made
