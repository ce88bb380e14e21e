"""The likeliest tokens of each row, by blocks of the vocabulary, then among the blocks' best.

Letters: m rows, V vocabulary, k kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.early import admit, await_earlier, early

BLOCK = tl.constexpr(2048)


@triton.jit
def _pack(value, index):
    """Make one integer that orders by value, and puts the earlier first among equals."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    # Below zero, floats order against their bits; all but the sign are turned over.
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _unpack(packed):
    """Give value and index back."""
    ordered = (packed >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(tl.float32, bitcast=True), 0x7FFFFFFF - (packed & 0x7FFFFFFF)


@triton.jit
def _block_best(logits, packs, tops, totals, V: tl.constexpr, K: tl.constexpr, EARLY: tl.constexpr):
    """The K best of one block, in order, and its share of the softmax's denominator."""
    admit(EARLY)
    await_earlier(EARLY)
    row = tl.program_id(0)
    block = tl.program_id(1)
    index = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row.to(tl.int64) * V + index, mask=index < V, other=float("-inf")).to(
        tl.float32
    )
    top = tl.max(value, axis=0)
    # A block may hold nothing but -inf; its difference to itself would not be a number.
    safe = tl.where(top == float("-inf"), 0.0, top)
    at = row * tl.num_programs(1) + block
    tl.store(tops + at, top)
    tl.store(totals + at, tl.sum(tl.exp(value - safe), axis=0))
    packed = _pack(value, index)
    for rank in range(K):
        highest = tl.max(packed, axis=0)
        tl.store(packs + at * K + rank, highest)
        packed = tl.where(packed == highest, -0x8000000000000000, packed)


@triton.jit
def _row_best(
    packs,
    tops,
    totals,
    logprobs,
    ids,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    CANDIDATES: tl.constexpr,
    K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The K best of one row's candidates, and their log-probabilities."""
    admit(EARLY)
    await_earlier(EARLY)
    row = tl.program_id(0)
    block = tl.arange(0, PADDED)
    at = row * BLOCKS + block
    tops_here = tl.load(tops + at, mask=block < BLOCKS, other=float("-inf"))
    totals_here = tl.load(totals + at, mask=block < BLOCKS, other=0.0)
    top = tl.max(tops_here, axis=0)
    denominator = tl.log(tl.sum(totals_here * tl.exp(tops_here - top), axis=0))
    index = tl.arange(0, CANDIDATES)
    packed = tl.load(
        packs + row * BLOCKS * K + index, mask=index < BLOCKS * K, other=-0x8000000000000000
    )
    for rank in range(K):
        highest = tl.max(packed, axis=0)
        value, token = _unpack(highest)
        tl.store(logprobs + row * K + rank, tl.minimum(value - top - denominator, 0.0))
        tl.store(ids + row * K + rank, token)
        packed = tl.where(packed == highest, -0x8000000000000000, packed)


def best(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `methods.fused.best`."""
    rows, vocabulary = logits.shape
    blocks = triton.cdiv(vocabulary, BLOCK.value)
    packs = torch.empty(rows, blocks, k, dtype=torch.int64, device=logits.device)
    tops = torch.empty(rows, blocks, dtype=torch.float32, device=logits.device)
    totals = torch.empty_like(tops)
    keywords = early(logits.device)
    _block_best[(rows, blocks)](
        logits, packs, tops, totals, V=vocabulary, K=k, num_warps=4, **keywords
    )
    logprobs = torch.empty(rows, k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, k, dtype=torch.int64, device=logits.device)
    _row_best[(rows,)](
        packs,
        tops,
        totals,
        logprobs,
        ids,
        BLOCKS=blocks,
        PADDED=triton.next_power_of_2(blocks),
        CANDIDATES=triton.next_power_of_2(blocks * k),
        K=k,
        num_warps=4,
        **keywords,
    )
    return logprobs, ids


def argmax(logits: Tensor) -> Tensor:
    """See `methods.fused.argmax`."""
    return best(logits, 1)[1].view(-1)
