"""Add a projection's bias and norm its heads, for models that do: one launch a layer.

Letters: n tokens, H query heads, G key-value heads, d head dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from methods.kernels.early import admit, await_earlier, early

# Heads of one program.
BATCH = tl.constexpr(8)


@triton.jit
def _settle(
    qkv, bias, norm, out, eps,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr,
    BIASED: tl.constexpr, NORMED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BATCH heads of one token, rounded where torch rounds; values are not normed."""
    admit(EARLY)
    dtype = qkv.dtype.element_ty
    head = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    within = head[:, None] * DIM + tl.arange(0, DIM)[None, :]
    real = (head < HEADS + 2 * GROUPS)[:, None]
    normed = (head < HEADS + GROUPS)[:, None]
    if BIASED:
        added = tl.load(bias + within, mask=real, other=0.0).to(tl.float32)
    if NORMED:
        weight = tl.load(norm + within, mask=normed, other=0.0).to(tl.float32)
    await_earlier(EARLY)
    at = tl.program_id(0).to(tl.int64) * (HEADS + 2 * GROUPS) * DIM + within
    value = tl.load(qkv + at, mask=real, other=0.0).to(tl.float32)
    if BIASED:
        value = (value + added).to(dtype).to(tl.float32)
    if NORMED:
        square = tl.sum(value * value, axis=1) / DIM
        rate = tl.div_rn(1.0, tl.sqrt_rn(square + eps))
        weighed = (value * rate[:, None]).to(dtype).to(tl.float32) * weight
        value = tl.where(normed, weighed, value)
    tl.store(out + at, value.to(dtype), mask=real)


def settle(
    qkv: Tensor, *, groups: int, dim: int, norm: Tensor | None, eps: float, bias: Tensor | None
) -> Tensor:
    """Give what attention takes. qkv: [n, (H + 2G) * d] -> the same shape.

    bias: [(H + 2G) * d]. norm: [H + G, 1, d], weights of `HeadNorm`, with its eps.
    """
    n, width = qkv.shape
    heads = width // dim
    out = torch.empty_like(qkv)
    _settle[(n, triton.cdiv(heads, BATCH.value))](
        qkv,
        qkv if bias is None else bias,
        qkv if norm is None else norm,
        out,
        eps,
        HEADS=heads - 2 * groups,
        GROUPS=groups,
        DIM=dim,
        BIASED=bias is not None,
        NORMED=norm is not None,
        num_warps=2,
        enable_fp_fusion=False,
        **early(qkv.device),
    )
    return out
