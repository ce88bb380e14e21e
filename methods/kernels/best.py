"""The likeliest tokens of each row, by blocks of the vocabulary, then among the blocks' best.

Of things in groups the K best lie in the K groups whose own best are highest, the earlier group
first among equals. That holds for the neighbours that a thread loads at once within a block, and
for the blocks of a row, so that no round of a search looks at more than a few keys a thread. A
program is one warp: its threads find a maximum by one instruction, and wait for no other warp.

Letters: m rows, V vocabulary, k kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.early import admit, await_earlier, early

BLOCK = tl.constexpr(2048)
CHUNK = tl.constexpr(8)  # 16 bytes of half precision, one load of a thread
# Places that a narrow key tells apart.
NARROW = 1 << 16


@triton.jit
def ordered(number):
    """Make integers that order as float32 numbers do, both zeros equal, and never the lowest."""
    bits = number.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def _key(value, place, WIDE: tl.constexpr):
    """Make one integer that orders by value, and puts the lower place first among equals.

    WIDE: 64 bits, for float32 or many places; else 32, half of them the value's own 16. Both zeros
    are equal, and the lowest integer is no number's.
    """
    if WIDE:
        order = ordered(value.to(tl.float32)).to(tl.int64)
        key = (order << 32) | (0x7FFFFFFF - place).to(tl.int64)
    else:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32)
        order = tl.where(bits < 0, -(bits & 0x7FFF), bits)
        key = (order << 16) | (0xFFFF - place)
    return key


@triton.jit
def _value(key, dtype: tl.constexpr, WIDE: tl.constexpr):
    """Give a key's value back, in float32. dtype: what `_key` was given."""
    if WIDE:
        order = (key >> 32).to(tl.int32)
        bits = tl.where(order < 0, (-order) | -0x80000000, order)
        value = bits.to(tl.float32, bitcast=True)
    else:
        order = key >> 16
        bits = tl.where(order < 0, (-order) | 0x8000, order)
        value = bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _place(key, WIDE: tl.constexpr):
    """Give a key's place back."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32) if WIDE else 0xFFFF - (key & 0xFFFF)


@triton.jit
def _moved(key, place, WIDE: tl.constexpr):
    """Give a key another place."""
    if WIDE:
        moved = (key >> 32 << 32) | (0x7FFFFFFF - place).to(tl.int64)
    else:
        moved = (key >> 16 << 16) | (0xFFFF - place)
    return moved


@triton.jit
def _highest(keys, K: tl.constexpr, PADDED: tl.constexpr, LOWEST: tl.constexpr):
    """The K highest keys in order, then LOWEST, as is whatever is wanted beyond all keys."""
    slot = tl.arange(0, PADDED)
    found = tl.full([PADDED], LOWEST, keys.dtype)
    for rank in range(K):
        highest = tl.max(keys)
        found = tl.where(slot == rank, highest, found)
        keys = tl.where(keys == highest, LOWEST, keys)
    return found


@triton.jit
def _block_best(
    logits,
    keys,
    tops,
    totals,
    V: tl.constexpr,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
    SCORED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The K best of one block, in order, and its share of the softmax's denominator."""
    admit(EARLY)
    await_earlier(EARLY)
    lowest: tl.constexpr = -0x8000000000000000 if WIDE else -0x80000000
    dtype: tl.constexpr = logits.dtype.element_ty
    row = tl.program_id(0)
    block = tl.program_id(1)
    logits += row.to(tl.int64) * V + block * BLOCK
    width = V - block * BLOCK  # tokens from here on; a last block has less than its own
    chunk = tl.arange(0, BLOCK // CHUNK)
    within = tl.arange(0, CHUNK)[None, :]
    place = chunk[:, None] * CHUNK + within
    value = tl.load(logits + place, mask=place < width, other=float("-inf")).to(tl.float32)
    chunk_tops = tl.max(value, axis=1)
    at = row * tl.num_programs(1) + block
    if SCORED:
        top = tl.max(chunk_tops, axis=0)
        # A block may hold nothing but -inf; its difference to itself would not be a number.
        safe = tl.where(top == float("-inf"), 0.0, top)
        tl.store(tops + at, top)
        tl.store(totals + at, tl.sum(tl.exp(value - safe)))
    best_chunks = _highest(_key(chunk_tops.to(dtype), chunk, WIDE), K, PADDED, lowest)
    place = _place(best_chunks, WIDE)[:, None] * CHUNK + within
    real = (best_chunks > lowest)[:, None] & (place < width)
    value = tl.load(logits + place, mask=real, other=float("-inf"))
    found = _highest(tl.where(real, _key(value, place, WIDE), lowest), K, PADDED, lowest)
    rank = tl.arange(0, PADDED)
    tl.store(keys + at * K + rank, found, mask=rank < K)


@triton.jit
def _row_best(
    keys,
    tops,
    totals,
    logprobs,
    ids,
    BLOCKS: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    SCORED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The K best of one row's blocks, in order, and their log-probabilities."""
    admit(EARLY)
    await_earlier(EARLY)
    lowest: tl.constexpr = -0x8000000000000000 if WIDE else -0x80000000
    row = tl.program_id(0)
    keys += row * BLOCKS * K
    block = tl.arange(0, PADDED_BLOCKS)
    head = tl.load(keys + block * K, mask=block < BLOCKS, other=lowest)
    heads = tl.where(block < BLOCKS, _moved(head, block, WIDE), lowest)
    best_blocks = _highest(heads, K, PADDED, lowest)
    rank = tl.arange(0, PADDED)
    place = _place(best_blocks, WIDE)[:, None] * K + rank[None, :]
    real = (best_blocks > lowest)[:, None] & (rank < K)[None, :]
    key = tl.load(keys + place, mask=real, other=lowest)
    found = _highest(tl.where(real, _moved(key, place, WIDE), lowest), K, PADDED, lowest)
    place = _place(found, WIDE)
    token = _place(tl.load(keys + place, mask=rank < K, other=lowest), WIDE)
    tl.store(ids + row * K + rank, place // K * BLOCK + token, mask=rank < K)
    if SCORED:
        at = row * BLOCKS + block
        tops_here = tl.load(tops + at, mask=block < BLOCKS, other=float("-inf"))
        totals_here = tl.load(totals + at, mask=block < BLOCKS, other=0.0)
        top = tl.max(tops_here, axis=0)
        denominator = tl.log(tl.sum(totals_here * tl.exp(tops_here - top), axis=0))
        logprob = tl.minimum(_value(found, DTYPE, WIDE) - top - denominator, 0.0)
        tl.store(logprobs + row * K + rank, logprob, mask=rank < K)


def best(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `methods.fused.best`."""
    logprobs = torch.empty(len(logits), k, dtype=torch.float32, device=logits.device)
    return logprobs, _best(logits, k, logprobs)


def argmax(logits: Tensor) -> Tensor:
    """See `methods.fused.argmax`."""
    return _best(logits, 1, None).view(-1)


def _best(logits: Tensor, k: int, logprobs: Tensor | None) -> Tensor:
    """Give the ids of the k best, [m, k]. logprobs: to write; None = not wanted."""
    rows, vocabulary = logits.shape
    blocks = triton.cdiv(vocabulary, BLOCK.value)
    wide = logits.dtype == torch.float32 or blocks * k > NARROW
    key_type = torch.int64 if wide else torch.int32
    keys = torch.empty(rows, blocks, k, dtype=key_type, device=logits.device)
    tops, totals = torch.empty(2, rows, blocks, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, k, dtype=torch.int64, device=logits.device)
    sizes = {"K": k, "PADDED": triton.next_power_of_2(k), "WIDE": wide}
    sizes |= {"SCORED": logprobs is not None} | early(logits.device)
    _block_best[(rows, blocks)](logits, keys, tops, totals, V=vocabulary, **sizes, num_warps=1)
    _row_best[(rows,)](
        keys,
        tops,
        totals,
        ids if logprobs is None else logprobs,  # not written where none is given
        ids,
        BLOCKS=blocks,
        PADDED_BLOCKS=triton.next_power_of_2(blocks),
        **sizes,
        DTYPE=getattr(tl, str(logits.dtype).removeprefix("torch.")),
        num_warps=1,
    )
    return ids
