"""The attention of an unrolled draft head: decided keys causally, drafted keys on the diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Rotated keys and values of one unrolled step, [B, H, n, d] each."""

    k: Tensor
    v: Tensor


def attend_unrolled(q: Tensor, decided: Keys, drafted: list[Keys]) -> Tensor:
    """Let row i of q see rows 0..i of the decided keys and row i of every drafted step.

    All are [B, H, n, d]; row i of a drafted step is the ancestor at its depth of query i. So the
    query of a draft sees the decided pairs and its own ancestors, as in a tree.
    """
    k = torch.stack([step.k for step in drafted])
    v = torch.stack([step.v for step in drafted])
    if q.is_cuda and q.dtype == torch.bfloat16:
        return flash_unrolled(q, decided, k, v)
    return attend_plainly(q, decided, k, v)


def attend_plainly(q: Tensor, decided: Keys, k: Tensor, v: Tensor) -> Tensor:
    """The same by a full matrix of scores; k, v: [s, B, H, n, d] of the drafted steps."""
    count, scale = q.shape[2], q.shape[-1] ** -0.5
    scores = (q @ decided.k.transpose(-1, -2)).float() * scale
    later = torch.ones(count, count, dtype=torch.bool, device=q.device).triu(1)
    own = (q * k).sum(-1).movedim(0, -1).float() * scale
    joined = torch.cat([scores.masked_fill(later, float("-inf")), own], dim=-1)
    weights = joined.softmax(-1).to(v.dtype)
    drafted = weights[..., count:].movedim(-1, 0).unsqueeze(-1) * v
    return weights[..., :count] @ decided.v + drafted.sum(0)


def flash_unrolled(q: Tensor, decided: Keys, k: Tensor, v: Tensor) -> Tensor:
    """The same on a GPU, the decided part by FlashAttention."""
    mixed: Tensor = _Flash.apply(q, decided.k, decided.v, k, v)  # type: ignore[no-untyped-call]
    return mixed


class _Flash(torch.autograd.Function):
    """Two parts of one softmax, joined.

    FlashAttention's backward needs of the forward only the output and the log-sum-exp of the
    scores: given those of all keys together, it yields the decided keys' share of the joint
    softmax's gradient.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k0: Tensor, v0: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ANN401
        """Join the decided part and the drafted part by their log-sum-exps."""
        scale = q.shape[-1] ** -0.5
        part, lse, *rest = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k0, v0, 0.0, True, False, scale=scale
        )
        scores = (q.float() * k).sum(-1) * scale
        total = torch.logaddexp(lse, scores.logsumexp(0))
        drafted = ((scores - total).exp().unsqueeze(-1) * v).sum(0)
        decided = (lse - total).exp().unsqueeze(-1) * part
        out: Tensor = (decided + drafted).to(q.dtype)
        ctx.save_for_backward(q, k0, v0, k, v, out, total, scores, *rest[4:6])
        ctx.sizes, ctx.scale = rest[2:4], scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        """Differentiate the joint softmax."""
        q, k0, v0, k, v, out, total, scores, seed, offset = ctx.saved_tensors
        grad = grad.contiguous()
        dq, dk0, dv0 = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k0, v0, out, total, None, None, *ctx.sizes, 0.0, True, seed, offset,
            scale=ctx.scale,
        )  # fmt: skip
        weights = (scores - total).exp()
        mean = (grad.float() * out).sum(-1)
        ds = weights * ((grad.float() * v).sum(-1) - mean) * ctx.scale
        dq += (ds.unsqueeze(-1) * k).sum(0).to(q.dtype)
        dk = (ds.unsqueeze(-1) * q).to(k.dtype)
        dv = (weights.unsqueeze(-1) * grad).to(v.dtype)
        gradients: tuple[Tensor, ...] = (dq, dk0, dv0, dk, dv)
        return gradients
