"""Turn queries and keys by their positions' angles, rounded where `methods.rope.rotate` rounds."""

import triton
import triton.language as tl


@triton.jit
def angles(cos, sin, position, real, DIM: tl.constexpr):
    """Cosines and sines of some positions, each [rows, DIM / 2]; nothing is read where not `real`.

    cos, sin: tables of `Rope.angles`, a row a position, whose halves are equal.
    """
    at = position[:, None] * DIM + tl.arange(0, DIM // 2)[None, :]
    real = real[:, None]
    return tl.load(cos + at, mask=real, other=0.0), tl.load(sin + at, mask=real, other=0.0)


@triton.jit
def turn(low, high, cos, sin):
    """Turn the halves of heads by their angles, all [rows, DIM / 2].

    Both products are rounded, then their sum. The kernel must be launched with
    enable_fp_fusion=False, or the compiler narrows both products to the dtype and fuses one into
    their sum.
    """
    turned_low = _rounded(low, cos) - _rounded(high, sin)
    turned_high = _rounded(high, cos) + _rounded(low, sin)
    return turned_low.to(low.dtype), turned_high.to(high.dtype)


@triton.jit
def _rounded(x, factor):
    """Their product, rounded to their dtype, as float32."""
    return (x.to(tl.float32) * factor.to(tl.float32)).to(x.dtype).to(tl.float32)
