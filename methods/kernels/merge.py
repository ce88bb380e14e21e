"""Add up what attention leaves of a row's chunks, in an order that depends on positions alone.

Everything here is done element by element, so that no layout can change a bit.
"""

import triton
import triton.language as tl

from methods.kernels.early import admit, await_earlier

CHUNK = tl.constexpr(64)  # keys of one product
SPLIT = tl.constexpr(256)  # keys whose chunks are added up before splits are
MOST = 4  # splits that are loaded at once


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
def add(top, total, acc, other_top, other_total, other_acc, scale):
    """Add the sums of later keys to those of earlier ones; either may be of none, its top -inf.

    top, total: maxima and sums of rows; acc: [rows, DIM]. Scores are scaled after the maximum is
    taken off: a difference times a factor leaves the compiler no product and sum to contract in
    one caller and not in the other.
    """
    highest = tl.maximum(top, other_top)
    old = tl.where(top == highest, 1.0, tl.exp2((top - highest) * scale))
    new = tl.where(other_top == highest, 1.0, tl.exp2((other_top - highest) * scale))
    total = tl.fma(total, old, other_total * new)
    acc = tl.fma(acc, tl.broadcast_to(old[:, None], acc.shape), other_acc * new[:, None])
    return highest, total, acc


@triton.jit(do_not_specialize=["nodes", "scratch", "splits"])
def combine(
    base_at, ancestors, tops, totals, sums, out, scale, nodes, scratch, splits,
    HEADS: tl.constexpr, DIM: tl.constexpr, DEPTH: tl.constexpr, PADDED: tl.constexpr,
    FINE: tl.constexpr, BATCH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Add up the chunks of one node and head, BATCH splits at once.

    splits: where not FINE, pieces before those of a node's own chunks.
    """
    admit(EARLY)
    row = tl.program_id(0) + tl.arange(0, 1)
    base = tl.load(base_at).to(tl.int32)
    length = length_of(ancestors, tl.program_id(0) // HEADS, scratch, DEPTH, PADDED)
    count = (base + length - 1) // CHUNK + 1
    own = base // CHUNK
    dim = tl.arange(0, DIM)[None, :]
    all_top = tl.full([1], float("-inf"), tl.float32)
    all_total = tl.zeros([1], tl.float32)
    all_acc = tl.zeros([1, DIM], tl.float32)
    await_earlier(EARLY)
    for begin in range(0, tl.cdiv(count, SPLIT // CHUNK), BATCH):
        for ahead in tl.static_range(BATCH):
            split = tl.full([1], begin + ahead, tl.int32)
            top = tl.full([1], float("-inf"), tl.float32)
            total = tl.zeros([1], tl.float32)
            acc = tl.zeros([1, DIM], tl.float32)
            for step in tl.static_range(SPLIT // CHUNK):
                chunk = split * (SPLIT // CHUNK) + step
                live = chunk < count
                piece = chunk
                if not FINE:  # shared chunks of a split are one piece, in place of its first
                    if step > 0:
                        live = live & (chunk >= own)
                    piece = tl.where(chunk < own, split, splits + chunk - own)
                place = piece * nodes * HEADS + row
                tile = sums + place[:, None].to(tl.int64) * DIM + dim
                new_top = tl.load(tops + place, mask=live, other=float("-inf"))
                new_total = tl.load(totals + place, mask=live, other=0.0)
                new_acc = tl.load(tile, mask=live[:, None], other=0.0)
                top, total, acc = add(top, total, acc, new_top, new_total, new_acc, scale)
            all_top, all_total, all_acc = add(all_top, all_total, all_acc, top, total, acc, scale)
    result = (all_acc / all_total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * DIM + dim, result)
