"""Activations rounded to block floating point in one pass: `quant.block_float`, bit for bit."""

import triton
import triton.language as tl
from torch import Tensor

from quant import block_float
from quant.block_float import BlockFloat
from quant.kernels.early import admit, await_earlier, early

WIDTH = tl.constexpr(block_float.BLOCK)
HIGHEST = tl.constexpr(float(block_float.HIGHEST))
LEAST = tl.constexpr(block_float.LEAST)
BLOCKS = tl.constexpr(8)  # of a program
# 1.5 * 2**23: a float32 below 2**22 added to it and taken off is rounded to whole, ties to even.
WHOLE = tl.constexpr(12582912.0)


@triton.jit
def digits(values):
    """Round blocks. values: [b, 128] float32 -> both digits, int8 of that shape, and scales [b]."""
    # The bits of positive floats are in the floats' order, infinity and NaN above all.
    top = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    exponent = (top >> 23) - 127
    shift = 14 - tl.maximum(exponent, LEAST)
    size = top.to(tl.float32, bitcast=True) * _power(shift)
    shift -= (size > HIGHEST).to(tl.int32)
    factor = _power(shift)
    whole = ((values * factor[:, None] + WHOLE) - WHOLE).to(tl.int32)
    first = (whole + 128) >> 8
    scale = tl.where(exponent > 127, float("nan"), _power(-shift))
    return first.to(tl.int8), (whole - first * 256).to(tl.int8), scale


@triton.jit
def _power(exponent):
    """Two to the exponent, of -126 ... 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_digits(values, out, scales, token, first_block, n, room, blocks):
    """Round [b, 128] values of a token, from a block on, and store what there is room for.

    What fills a row up to whole blocks must be 0.

    out: [2, n, blocks * 128] int8. scales: [blocks, room] float32.
    """
    one, two, scale = digits(values)
    block = first_block + tl.arange(0, values.shape[0])
    real = block < blocks
    column = tl.arange(0, WIDTH)[None, :]
    place = (token.to(tl.int64) * blocks + block)[:, None] * WIDTH + column
    tl.store(out + place, _ordered(one), mask=real[:, None])
    tl.store(out + n.to(tl.int64) * blocks * WIDTH + place, _ordered(two), mask=real[:, None])
    tl.store(scales + block * room + token, scale, mask=real)


@triton.jit
def _ordered(values):
    """Put every 16 of [b, 128] in the order of block_float.ORDER: 2c + 8h + l goes to 4c + 2l + h.

    Values move and not addresses, so that a warp's bytes lie side by side: scattered ones took 10
    us a row of 4,096 to be stored (H200).
    """
    parts = tl.reshape(values, [values.shape[0] * (WIDTH // 16), 2, 4, 2])
    return tl.reshape(tl.permute(parts, [0, 2, 3, 1]), [values.shape[0], WIDTH])


@triton.jit(do_not_specialize=["n", "room"])
def _round_blocks(x, out, scales, n, room, stride, k, blocks, EARLY: tl.constexpr):
    """BLOCKS blocks of one token."""
    admit(EARLY)
    await_earlier(EARLY)
    token, first = tl.program_id(0), tl.program_id(1) * BLOCKS
    at = (first + tl.arange(0, BLOCKS))[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    values = tl.load(x + token.to(tl.int64) * stride + at, mask=at < k, other=0.0)
    store_digits(values.to(tl.float32), out, scales, token, first, n, room, blocks)


def round_blocks(x: Tensor) -> BlockFloat:
    """See `quant.block_float.round_blocks`. x: [n, K], its rows contiguous."""
    n, k = x.shape
    made = block_float.empty(n, k, x.device)
    blocks, room = made.scales.shape
    _round_blocks[(n, triton.cdiv(blocks, BLOCKS.value))](
        x, *made, n, room, x.stride(0), k, blocks, num_warps=4, **early(x.device)
    )
    return made
