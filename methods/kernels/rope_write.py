"""Turn queries and keys, and write keys and values into the cache: one launch a layer.

Letters: n new tokens, H query heads, G key-value heads, S slots, d head dimension, P positions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.early import admit, await_earlier, early

# Heads that one program turns.
BATCH = tl.constexpr(8)


@triton.jit(do_not_specialize=["scratch"])
def _rope_write(
    qkv,
    bias,
    norm,
    cos,
    sin,
    positions,
    cache,
    base_at,
    queries,
    scratch,
    eps,
    stride_kind,
    stride_group,
    stride_slot,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BIASED: tl.constexpr,
    NORMED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BATCH heads of one token, each as its low and high half, rounded where torch rounds."""
    admit(EARLY)
    half: tl.constexpr = DIM // 2
    head = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    lane = tl.arange(0, half)
    within = head[:, None] * DIM + lane[None, :]
    real = (head < HEADS + 2 * GROUPS)[:, None]
    turning = (head < HEADS + GROUPS)[:, None]
    if BIASED:
        low_bias, high_bias = _halves(bias + within, real, DIM)
    if NORMED:
        low_weight, high_weight = _halves(norm + within, turning, DIM)
    await_earlier(EARLY)
    dtype = qkv.dtype.element_ty
    token = tl.program_id(0)
    low, high = _halves(qkv + token.to(tl.int64) * (HEADS + 2 * GROUPS) * DIM + within, real, DIM)
    if BIASED:
        low = (low + low_bias).to(dtype).to(tl.float32)
        high = (high + high_bias).to(dtype).to(tl.float32)
    straight_low, straight_high = low, high  # values are not turned
    if NORMED:
        low, high = _norm(low, high, low_weight, high_weight, eps, dtype, DIM)
    angle = tl.load(positions + token) * DIM + lane[None, :]
    turned_low, turned_high = _turn(low, high, cos + angle, sin + angle, dtype, DIM)
    low = tl.where(turning, turned_low, straight_low)
    high = tl.where(turning, turned_high, straight_high)
    query = queries + token * HEADS * DIM + within
    asking = (head < HEADS)[:, None]
    tl.store(query, low.to(dtype), mask=asking)
    tl.store(query + half, high.to(dtype), mask=asking)
    kind = (head - HEADS) // GROUPS
    group = (head - HEADS) % GROUPS
    start = kind.to(tl.int64) * stride_kind + group * stride_group
    slot = tl.load(base_at) + scratch + token
    entry = cache + start[:, None] + slot * stride_slot + lane[None, :]
    kept = real & (head >= HEADS)[:, None]
    tl.store(entry, low.to(dtype), mask=kept)
    tl.store(entry + half, high.to(dtype), mask=kept)


@triton.jit
def _halves(low, mask, DIM: tl.constexpr):
    """Load the low and the high half of each head in float32."""
    high = tl.load(low + DIM // 2, mask=mask, other=0.0).to(tl.float32)
    return tl.load(low, mask=mask, other=0.0).to(tl.float32), high


@triton.jit
def _norm(low, high, low_weight, high_weight, eps, dtype: tl.constexpr, DIM: tl.constexpr):
    """Norm each head, round, then weigh and round again, as `HeadNorm` does."""
    rate = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(low * low + high * high, axis=1) / DIM + eps))
    low = (low * rate[:, None]).to(dtype).to(tl.float32) * low_weight
    high = (high * rate[:, None]).to(dtype).to(tl.float32) * high_weight
    return low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)


@triton.jit
def _turn(low, high, cos, sin, dtype: tl.constexpr, DIM: tl.constexpr):
    """Turn each pair by its angle; `methods.rope.rotate` rounds both products, then the sum."""
    half: tl.constexpr = DIM // 2
    first = (low * tl.load(cos).to(tl.float32)).to(dtype).to(tl.float32)
    second = (high * tl.load(sin).to(tl.float32)).to(dtype).to(tl.float32)
    third = (high * tl.load(cos + half).to(tl.float32)).to(dtype).to(tl.float32)
    fourth = (low * tl.load(sin + half).to(tl.float32)).to(dtype).to(tl.float32)
    return first - second, third + fourth


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cache: Tensor,
    base: Tensor,
    scratch: int,
    *,
    norm: Tensor | None,
    eps: float,
    bias: Tensor | None,
) -> Tensor:
    """See `methods.fused.rope_write`."""
    n, width = qkv.shape
    _, groups, _, dim = cache.shape
    heads = width // dim - 2 * groups
    queries = torch.empty(n, heads, dim, dtype=qkv.dtype, device=qkv.device)
    _rope_write[(n, triton.cdiv(heads + 2 * groups, BATCH.value))](
        qkv,
        qkv if bias is None else bias,
        qkv if norm is None else norm,
        cos,
        sin,
        positions,
        cache,
        base,
        queries,
        scratch,
        eps,
        *cache.stride()[:3],
        HEADS=heads,
        GROUPS=groups,
        DIM=dim,
        BIASED=bias is not None,
        NORMED=norm is not None,
        num_warps=2,
        # Else the compiler narrows both products to the dtype and fuses one into their sum.
        enable_fp_fusion=False,
        **early(qkv.device),
    )
    return queries
