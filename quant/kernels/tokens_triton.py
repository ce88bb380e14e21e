"""Activations rounded per token in one pass over them: `quant.grid.round_tokens`, bit for bit.

The reference takes eight passes. One program rounds one row and keeps it in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.grid import E4M3_MAX, INT8_MAX, Tokens
from quant.kernels.blocks_triton import WHOLE
from quant.kernels.early import admit, await_earlier, early

TINY = torch.finfo(torch.float32).tiny
SCALE_ROWS = 4  # what is loaded in bulk wants its rows' scales to fill 16 bytes


@triton.jit
def _round_rows(
    x, smooth, codes, scales, factor, k, highest, tiny,
    has_smooth: tl.constexpr, is_float: tl.constexpr, block: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    admit(EARLY)
    column = tl.arange(0, block)
    inside = column < k
    if has_smooth:
        divisor = tl.load(smooth + column, mask=inside, other=1.0)
    await_earlier(EARLY)
    row = tl.program_id(0).to(tl.int64)
    values = tl.load(x + row * k + column, mask=inside, other=0.0).to(tl.float32)
    if has_smooth:
        values = tl.div_rn(values, divisor)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(values), axis=0), highest), tiny)
    # A maximum passes over NaNs; the reference's does not.
    bad = tl.max((values != values).to(tl.int32), axis=0)
    steps = tl.div_rn(values, scale)
    if is_float:
        rounded = steps.to(tl.float8e4nv)
    else:
        rounded = ((steps + WHOLE) - WHOLE).to(tl.int32).to(tl.int8)
    tl.store(codes + row * k + column, rounded, mask=inside)
    tl.store(scales + row, tl.where(bad > 0, float("nan"), scale * factor))


def round_rows(
    x: Tensor,
    *,
    codes: torch.dtype,
    smooth: Tensor | None = None,
    factor: float = 1.0,
    pad: int = 0,
) -> Tokens:
    """Round each row to int8 or e4m3. x: [n, K] contiguous -> codes [n + pad, K], scale [n, 1].

    smooth: [K] float32 that x is divided by first. factor: a power of two that the scales are
    multiplied by. pad: rows of zero codes below.
    """
    if codes not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"codes must be int8 or float8_e4m3fn, got {codes}")
    if x.ndim != 2 or not x.is_contiguous() or not x.is_floating_point():
        raise ValueError(
            f"x must be contiguous floats of shape [n, K], got {x.dtype} of shape "
            f"{list(x.shape)}, strides {list(x.stride())}"
        )
    n, k = x.shape
    rounded = torch.empty(n + pad, k, dtype=codes, device=x.device)
    if pad:
        rounded[n:].zero_()
    room = -(-n // SCALE_ROWS) * SCALE_ROWS
    scales = torch.empty(room, dtype=torch.float32, device=x.device)[:n].view(n, 1)
    is_float = codes == torch.float8_e4m3fn
    block = triton.next_power_of_2(k)
    _round_rows[(n,)](
        x,
        x if smooth is None else smooth,
        rounded,
        scales,
        factor,
        k,
        E4M3_MAX if is_float else float(INT8_MAX),
        TINY,
        has_smooth=smooth is not None,
        is_float=is_float,
        block=block,
        num_warps=min(16, max(4, block // 1024)),
        **early(x.device),
    )
    return Tokens(rounded, scales)
