"""Attention of new tokens over decided ones and their own ancestors, bit-equal however read.

A node's result must not depend on whether it is read alone, in a chain or in a tree: greedy
speculation then gives the very tokens of plain decoding, near-ties included. So every sum runs in
an order that depends on positions alone:

- Keys are cut by position, not by slot, into chunks of CHUNK. A chunk's softmax is taken by itself
  (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867). Chunks are added up in order
  within splits of SPLIT keys, splits in order of position ("flash decoding").
- Chunks that end at or before `base` hold decided keys alone, the same for every node: nodes share
  tiles of rows there, a program for each chunk where there are few rows, else for each split. From
  there on a node's keys are its own path: a program for each node, group and chunk.
- A tile always has ROWS rows, so that one matrix instruction serves all; what pads it is dropped.

New keys and values come as they are projected. Whoever reads a new key turns it; whose it is
stores it. So nothing waits for the cache, and turning needs no launch of its own.

What only tells where and what to read is loaded before earlier kernels have ended, and so are
decided keys and values (`methods.fused.attend` says what callers owe for that).

Letters: n new tokens, H query heads, G key-value heads, S slots, d head dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from methods.kernels.early import admit, await_earlier, early
from methods.kernels.merge import CHUNK, MOST, SPLIT, add, combine, length_of
from methods.kernels.turn import angles, turn

ROWS = tl.constexpr(64)
# With more chunks or tiles than these a program adds a split's chunks itself.
FINE_CHUNKS, FINE_TILES = 32, 1
STAGES = 3  # chunks in flight there
LOG2_E = 1.4426950408889634


@triton.jit
def _chunk(query_low, query_high, low, high, values, seen, scale, PRECISION: tl.constexpr):
    """One chunk's maxima [ROWS], sums [ROWS] and weighted values [ROWS, DIM].

    low, high: halves of its keys, [CHUNK, DIM / 2]; queries likewise, [ROWS, DIM / 2].
    """
    scores = tl.dot(query_low, tl.trans(low), input_precision=PRECISION)
    scores = tl.dot(query_high, tl.trans(high), scores, input_precision=PRECISION)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    top = tl.max(scores, axis=1)
    weights = tl.exp2((scores - top[:, None]) * scale)
    total = tl.sum(weights, axis=1)
    return top, total, tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)


@triton.jit
def _rows(qkv, group, first, rows, HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr):
    """Rows [first, rows) of those that share a group's keys: nodes, then heads.

    Gives their nodes, their places among all heads, where their queries lie, and which are real.
    """
    shared: tl.constexpr = HEADS // GROUPS
    row = first + tl.arange(0, ROWS)
    node = row // shared
    head = group * shared + row % shared
    at = qkv + ((node * (HEADS + 2 * GROUPS) + head) * DIM)[:, None]
    return node, node * HEADS + head, at + tl.arange(0, DIM // 2)[None, :], row < rows


@triton.jit
def _queries(at, real, cos, sin, DIM: tl.constexpr):
    """Turned queries as low and high halves. cos, sin: their angles."""
    low = tl.load(at, mask=real[:, None], other=0.0)
    high = tl.load(at + DIM // 2, mask=real[:, None], other=0.0)
    return turn(low, high, cos, sin)


@triton.jit
def _leave(tops, totals, sums, piece, nodes, place, real, top, total, acc,
           HEADS: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    """Store a partial result for `merge`."""
    at = piece * nodes * HEADS + place
    dim = tl.arange(0, DIM)
    tl.store(tops + at, top, mask=real)
    tl.store(totals + at, total, mask=real)
    tl.store(sums + at[:, None].to(tl.int64) * DIM + dim[None, :], acc, mask=real[:, None])


@triton.jit
def _decided(
    qkv, cos, sin, positions, cache, base, tops, totals, sums, scale, nodes, tiles,
    stride_kind, stride_slot,
    group, HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr,
    FINE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Decided keys for a tile of rows: of one chunk where FINE, else of a split's whole chunks."""
    program = tl.program_id(0)
    piece = program // (tiles * GROUPS)
    first = program // GROUPS % tiles * ROWS
    node, place, query, real = _rows(
        qkv, group, first, nodes * (HEADS // GROUPS), HEADS, GROUPS, DIM
    )
    slot = tl.arange(0, CHUNK)
    key = cache + slot[:, None] * stride_slot + tl.arange(0, DIM // 2)[None, :]
    value = cache + stride_kind + slot[:, None] * stride_slot + tl.arange(0, DIM)[None, :]
    every = tl.full([CHUNK], True, tl.int1)
    size: tl.constexpr = CHUNK if FINE else SPLIT
    start = piece * size
    end = tl.minimum(start + size, base // CHUNK * CHUNK)
    if start >= end:
        await_earlier(EARLY)
    else:
        position = tl.load(positions + node, mask=real, other=0)
        turned_by, turned_across = angles(cos, sin, position, real, DIM)
        if FINE:
            key += start * stride_slot
            low, high = tl.load(key), tl.load(key + DIM // 2)
            values = tl.load(value + start * stride_slot)
            await_earlier(EARLY)
            query_low, query_high = _queries(query, real, turned_by, turned_across, DIM)
            top, total, acc = _chunk(
                query_low, query_high, low, high, values, every, scale, PRECISION
            )
        else:
            await_earlier(EARLY)
            query_low, query_high = _queries(query, real, turned_by, turned_across, DIM)
            top = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, DIM], tl.float32)
            for begin in tl.range(start, end, CHUNK, num_stages=STAGES):
                low = tl.load(key + begin * stride_slot)
                high = tl.load(key + begin * stride_slot + DIM // 2)
                values = tl.load(value + begin * stride_slot)
                new_top, new_total, new_acc = _chunk(
                    query_low, query_high, low, high, values, every, scale, PRECISION
                )
                top, total, acc = add(top, total, acc, new_top, new_total, new_acc, scale)
        _leave(tops, totals, sums, piece, nodes, place, real, top, total, acc, HEADS, DIM)


@triton.jit
def _own(
    qkv, cos, sin, positions, cache, base, ancestors, tops, totals, sums, scale, nodes, scratch,
    program, before, stride_kind, stride_slot,
    group, HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr,
    DEPTH: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A chunk of one node's own path, what is decided of its first included.

    before: pieces before those of own chunks. Stores the node's key and value.
    """
    shared: tl.constexpr = HEADS // GROUPS
    own = program // GROUPS % nodes
    index = program // (GROUPS * nodes)
    lane = tl.arange(0, DIM // 2)[None, :]
    dim = tl.arange(0, DIM)[None, :]
    start = (base // CHUNK + index) * CHUNK
    length = base + length_of(ancestors, own, scratch, DEPTH, PADDED)
    if start >= length:
        await_earlier(EARLY)
    else:
        position = start + tl.arange(0, CHUNK)
        decided = (position < base)[:, None]
        stored = (cache + position * stride_slot)[:, None]
        old_low = tl.load(stored + lane, mask=decided, other=0.0)
        old_high = tl.load(stored + DIM // 2 + lane, mask=decided, other=0.0)
        old_values = tl.load(stored + stride_kind + dim, mask=decided, other=0.0)
        seen = position < length
        drafted = seen & (position >= base)
        slot = position - base
        if DEPTH > 0:
            slot = tl.load(ancestors + own * DEPTH + slot, mask=drafted, other=0)
        token = slot - scratch
        new = drafted & (token >= 0)
        entry = cache + (base + slot) * stride_slot
        first = own * shared
        node, place, query, real = _rows(qkv, group, first, first + shared, HEADS, GROUPS, DIM)
        at = tl.load(positions + node, mask=real, other=0)
        turned_by, turned_across = angles(cos, sin, at, real, DIM)
        itself = (position == length - 1)[:, None]
        by, across = angles(cos, sin, tl.load(positions + token, mask=new, other=0), new, DIM)
        projected = qkv + (token * (HEADS + 2 * GROUPS) + HEADS + group) * DIM
        key = tl.where(new, projected, entry)[:, None] + lane
        value = tl.where(new, projected + GROUPS * DIM, entry + stride_kind)[:, None] + dim
        await_earlier(EARLY)
        query_low, query_high = _queries(query, real, turned_by, turned_across, DIM)
        low = tl.load(key, mask=drafted[:, None], other=old_low)
        high = tl.load(key + DIM // 2, mask=drafted[:, None], other=old_high)
        values = tl.load(value, mask=drafted[:, None], other=old_values)
        turned_low, turned_high = turn(low, high, by, across)
        low = tl.where(new[:, None], turned_low, low)
        high = tl.where(new[:, None], turned_high, high)
        entry = entry[:, None]
        tl.store(entry + lane, low, mask=itself)
        tl.store(entry + DIM // 2 + lane, high, mask=itself)
        tl.store(entry + stride_kind + dim, values, mask=itself)
        top, total, acc = _chunk(query_low, query_high, low, high, values, seen, scale, PRECISION)
        piece = before + index
        _leave(tops, totals, sums, piece, nodes, place, real, top, total, acc, HEADS, DIM)


@triton.jit(do_not_specialize=["nodes", "scratch", "tiles", "shared_programs", "splits"])
def _partials(
    qkv, cos, sin, positions, cache, base_at, ancestors, tops, totals, sums, scale,
    nodes, scratch, tiles, shared_programs, splits, stride_kind, stride_group, stride_slot,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr,
    DEPTH: tl.constexpr, PADDED: tl.constexpr, FINE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """First the programs of shared tiles, then those of single nodes."""
    admit(EARLY)
    program = tl.program_id(0)
    group = program % GROUPS
    base = tl.load(base_at).to(tl.int32)
    cache += group.to(tl.int64) * stride_group
    if program < shared_programs:
        _decided(
            qkv, cos, sin, positions, cache, base, tops, totals, sums, scale, nodes, tiles,
            stride_kind, stride_slot, group, HEADS, GROUPS, DIM, FINE, PRECISION, STAGES, EARLY,
        )  # fmt: skip
    else:
        before = base // CHUNK if FINE else splits
        _own(
            qkv, cos, sin, positions, cache, base, ancestors, tops, totals, sums, scale, nodes,
            scratch, program - shared_programs, before, stride_kind, stride_slot, group,
            HEADS, GROUPS, DIM, DEPTH, PADDED, PRECISION, EARLY,
        )  # fmt: skip


def attend(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cache: Tensor,
    base: Tensor,
    scratch: int,
    *,
    ancestors: Tensor | None,
) -> Tensor:
    """See `methods.fused.attend`; no bias, no norm."""
    nodes, width = qkv.shape
    _, groups, capacity, dim = cache.shape
    heads = width // dim - 2 * groups
    tiles = triton.cdiv(nodes * heads // groups, ROWS.value)
    chunks, splits = (triton.cdiv(capacity, size.value) for size in (CHUNK, SPLIT))
    fine = tiles <= FINE_TILES and chunks <= FINE_CHUNKS
    depth = 0 if ancestors is None else ancestors.shape[1]
    own_chunks = (CHUNK.value + (depth or scratch + nodes) - 2) // CHUNK.value + 1
    pieces = chunks if fine else splits + own_chunks
    shared_programs = (chunks if fine else splits) * tiles * groups
    scalars = qkv.new_empty(2, pieces, nodes * heads, dtype=torch.float32)
    sums = qkv.new_empty(pieces, nodes * heads, dim, dtype=torch.float32)
    out = torch.empty(nodes, heads * dim, dtype=qkv.dtype, device=qkv.device)
    scale = LOG2_E / dim**0.5
    path = positions if ancestors is None else ancestors  # not read where none is given
    common = {
        **{"HEADS": heads, "DIM": dim, "DEPTH": depth, "FINE": fine},
        "PADDED": triton.next_power_of_2(depth or 1),
        "enable_fp_fusion": False,
        **early(qkv.device),
    }
    _partials[(shared_programs + own_chunks * nodes * groups,)](
        *(qkv, cos, sin, positions, cache, base, path, *scalars, sums, scale),
        *(nodes, scratch, tiles, shared_programs, splits, *cache.stride()[:3]),
        GROUPS=groups,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
        STAGES=STAGES,
        num_warps=4,
        **common,
    )
    combine[(nodes * heads,)](
        *(base, path, *scalars, sums, out, scale, nodes, scratch, splits),
        BATCH=min(MOST, splits),
        num_warps=1,
        **common,
    )
    return out
