"""Add a layer's output to the stream and norm the sum: one launch, one program a token.

Letters: n tokens, D hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant import block_float
from quant.block_float import BlockFloat
from quant.grid import INT8_MAX, Tokens
from quant.kernels.blocks_triton import WHOLE, round_blocks, store_digits
from quant.kernels.blocks_triton import WIDTH as DIGITS
from quant.kernels.early import admit, await_earlier, early


@triton.jit(do_not_specialize=["n", "room"])
def _add_norm(
    x,
    residual,
    weight,
    summed,
    normed,
    scales,
    eps,
    tiniest,
    n,
    room,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDED: tl.constexpr,
    HIGHEST: tl.constexpr,
    ROUNDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One token. HIGHEST: the largest code of a rounded result, 0 where it is not rounded.

    ROUNDED: to digits, with scales, of n tokens; else n and room are not looked at.
    """
    admit(EARLY)
    column = tl.arange(0, BLOCK)
    real = column < WIDTH
    factor = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    await_earlier(EARLY)
    dtype = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * WIDTH
    value = tl.load(x + row + column, mask=real, other=0.0).to(tl.float32)
    if ADDED:
        value += tl.load(residual + row + column, mask=real, other=0.0).to(tl.float32)
        value = value.to(dtype)
        tl.store(summed + row + column, value, mask=real)
        value = value.to(tl.float32)
    square = tl.sum(value * value, axis=0) / WIDTH
    rate = tl.div_rn(1.0, tl.sqrt_rn(square + eps))
    value = (value * rate * factor).to(dtype)
    if HIGHEST > 0:
        value = value.to(tl.float32)
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(value), axis=0), HIGHEST), tiniest)
        tl.store(scales + tl.program_id(0), scale)
        value = (tl.div_rn(value, scale) + WHOLE) - WHOLE
    if ROUNDED:
        # What fills the last block is 0, as x and the weight are taken for there.
        values = tl.reshape(value.to(tl.float32), [BLOCK // DIGITS, DIGITS])
        store_digits(values, normed, scales, tl.program_id(0), 0, n, room, tl.cdiv(WIDTH, DIGITS))
    else:
        tl.store(normed + row + column, value.to(normed.dtype.element_ty), mask=real)


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, digits: bool = False
) -> tuple[Tensor | BlockFloat, Tensor]:
    """See `methods.fused.add_norm`."""
    if digits and x.shape[1] > DIGITS.value // 2:  # a program has whole blocks
        rounded = block_float.empty(len(x), x.shape[1], x.device)
        out, scales = rounded
        return rounded, _launch(x, residual, weight, eps, normed=out, scales=scales, rounded=True)
    normed = torch.empty_like(x)
    summed = _launch(x, residual, weight, eps, normed=normed, scales=normed)
    return round_blocks(normed) if digits else normed, summed


def add_norm_round(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tokens, Tensor]:
    """See `methods.fused.add_norm_round`."""
    codes = torch.empty_like(x, dtype=torch.int8)
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    summed = _launch(x, residual, weight, eps, normed=codes, scales=scale, highest=float(INT8_MAX))
    return Tokens(codes, scale), summed


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    normed: Tensor,
    scales: Tensor,
    highest: float = 0.0,
    rounded: bool = False,
) -> Tensor:
    n, width = x.shape
    block = triton.next_power_of_2(width)
    summed = x if residual is None else torch.empty_like(x)
    _add_norm[(n,)](
        x,
        x if residual is None else residual,
        weight,
        summed,
        normed,
        scales,
        eps,
        torch.finfo(torch.float32).tiny,
        n,
        scales.shape[1],
        WIDTH=width,
        BLOCK=block,
        ADDED=residual is not None,
        HIGHEST=highest,
        ROUNDED=rounded,
        enable_fp_fusion=False,
        num_warps=min(16, max(1, block // 512)),
        **early(x.device),
    )
    return summed
