"""Add a layer's output to the stream and norm the sum: one launch, one program a token.

Letters: n tokens, D hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from methods.kernels.early import admit, await_earlier, early


@triton.jit
def _add_norm(
    x, residual, weight, summed, normed, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One token."""
    admit(EARLY)
    dtype = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    real = column < WIDTH
    factor = tl.load(weight + column, mask=real, other=0.0)
    await_earlier(EARLY)
    value = tl.load(x + row + column, mask=real, other=0.0).to(tl.float32)
    if ADDED:
        value += tl.load(residual + row + column, mask=real, other=0.0).to(tl.float32)
        value = value.to(dtype)
        tl.store(summed + row + column, value, mask=real)
        value = value.to(tl.float32)
    square = tl.sum(value * value, axis=0) / WIDTH
    rate = tl.div_rn(1.0, tl.sqrt_rn(square + eps))
    tl.store(normed + row + column, (value * rate * factor.to(tl.float32)).to(dtype), mask=real)


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `methods.fused.add_norm`."""
    n, width = x.shape
    block = triton.next_power_of_2(width)
    normed = torch.empty_like(x)
    summed = x if residual is None else torch.empty_like(x)
    _add_norm[(n,)](
        x,
        x if residual is None else residual,
        weight,
        summed,
        normed,
        eps,
        WIDTH=width,
        BLOCK=block,
        ADDED=residual is not None,
        enable_fp_fusion=False,
        num_warps=min(16, max(1, block // 512)),
        **early(x.device),
    )
    return normed, summed
