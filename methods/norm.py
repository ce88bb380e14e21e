"""Root-mean-square norms (Zhang and Sennrich 2019, arXiv 1910.07467)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.fused import add_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight."""

    weight: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] -> [..., D]."""
        return self.add(x, None)[0]

    def add(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """Norm a residual stream after what a layer adds to it. x, delta: [..., D].

        Gives the normed stream and the stream itself, x + delta.
        """
        width = x.shape[-1]
        rows = None if delta is None else delta.reshape(-1, width)
        normed, summed = add_norm(x.reshape(-1, width), rows, self.weight, self.eps)
        return normed.view(x.shape), summed.view(x.shape)


class HeadNorm(nn.Module):
    """Root-mean-square norm of every query head and every key head, each kind with its weight."""

    weight: Tensor

    def __init__(
        self, *, heads: int, groups: int, queries: Tensor, keys: Tensor, eps: float
    ) -> None:
        """queries, keys: [d]."""
        super().__init__()
        # A row a head, so that both kinds are one product.
        parts = [queries.expand(heads, 1, -1), keys.expand(groups, 1, -1)]
        self.register_buffer("weight", torch.cat(parts))
        self.eps = eps

    def forward(self, heads: Tensor) -> Tensor:
        """heads: [B, H + G, n, d] -> the same shape."""
        return F.rms_norm(heads, heads.shape[-1:], None, self.eps) * self.weight
