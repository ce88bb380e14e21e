"""SiLU-gate one half of a fused projection by the other. Letters: n tokens, I inner width."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant import block_float
from quant.block_float import BlockFloat
from quant.kernels.blocks_triton import WIDTH as DIGITS
from quant.kernels.blocks_triton import store_digits
from quant.kernels.early import admit, await_earlier, early

BLOCK = tl.constexpr(1024)


@triton.jit(do_not_specialize=["n", "room"])
def _silu_mul(
    gate_up,
    out,
    scales,
    n,
    room,
    WIDTH: tl.constexpr,
    ROUNDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BLOCK columns of one token, rounded between the two steps, as torch rounds.

    ROUNDED: to digits, with scales, of n tokens; else scales, n and room are not looked at.
    """
    admit(EARLY)
    await_earlier(EARLY)
    dtype = gate_up.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < WIDTH
    at = gate_up + row * 2 * WIDTH + column
    gate = tl.load(at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=real, other=0.0).to(tl.float32)
    silu = tl.div_rn(gate, 1.0 + tl.exp(-gate)).to(dtype).to(tl.float32)
    gated = (silu * up).to(dtype)
    if ROUNDED:
        # What fills the last block is 0, as what it is made of.
        values = tl.reshape(gated.to(tl.float32), [BLOCK // DIGITS, DIGITS])
        first, blocks = tl.program_id(1) * (BLOCK // DIGITS), tl.cdiv(WIDTH, DIGITS)
        store_digits(values, out, scales, row, first, n, room, blocks)
    else:
        tl.store(out + row * WIDTH + column, gated, mask=real)


def silu_mul(gate_up: Tensor, *, digits: bool = False) -> Tensor | BlockFloat:
    """See `methods.fused.silu_mul`."""
    n, inner = len(gate_up), gate_up.shape[1] // 2
    made: Tensor | BlockFloat
    if digits:
        out, scales = made = block_float.empty(n, inner, gate_up.device)
    else:
        out = scales = made = torch.empty(n, inner, dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul[(n, triton.cdiv(inner, BLOCK.value))](
        gate_up,
        out,
        scales,
        n,
        scales.shape[1],
        WIDTH=inner,
        ROUNDED=digits,
        enable_fp_fusion=False,
        **early(out.device),
    )
    return made
