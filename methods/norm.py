"""Root-mean-square norms (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.fused import add_norm
from quant.block_float import BlockFloat
from quant.scheme import QuantLinear


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

    @overload
    def add(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]: ...

    @overload
    def add(
        self, x: Tensor, delta: Tensor | None, *, reader: QuantLinear
    ) -> tuple[Tensor | BlockFloat, Tensor]: ...

    def add(
        self, x: Tensor, delta: Tensor | None, *, reader: QuantLinear | None = None
    ) -> tuple[Tensor | BlockFloat, Tensor]:
        """Norm a residual stream after what a layer adds to it. x, delta: [..., D].

        Gives the normed stream and the stream itself, x + delta. reader: of the normed stream,
        which is given to it as digits where it reads those and x is [n, D] or [1, n, D].
        """
        width = x.shape[-1]
        rows = x.reshape(-1, width)
        n = len(rows)
        added = None if delta is None else delta.reshape(-1, width)
        one = x.dim() > 1 and n == x.shape[-2]  # sequence
        digits = reader is not None and one and reader.reads_digits(n)
        normed, summed = add_norm(rows, added, self.weight, self.eps, digits=digits)
        shaped = normed if isinstance(normed, BlockFloat) else normed.view(x.shape)
        return shaped, summed.view(x.shape)


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
