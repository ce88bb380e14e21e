"""Layers of gates over ups that gate by themselves, so that a step has one launch fewer.

Letters: n tokens, K in-features, I gates and as many ups, N = 2 I out-features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from quant.kernels.kernel import KernelLinear
from quant.scheme import QuantLinear


class GatedLinear(KernelLinear):
    """Gives gates and ups as any layer does or, where it is asked to, silu(gate) * up."""

    def __init__(
        self,
        layer: QuantLinear,
        gated: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        *,
        most: int | None,
    ) -> None:
        """layer: gives gates and ups. gated: of the same weight, [n, K] -> [n, I].

        Gate and up are rounded to dtype, silu(gate) again and what is given again, as if each were
        stored. most: rows that `gated` takes; None: any number.
        """
        super().__init__(layer, kernel=layer.kernel, dtype=dtype)
        self.layer = layer
        self.most = most
        self._gated = gated

    def gates(self, x: Tensor) -> bool:
        """Whether as many rows can be gated here. x: [..., K]."""
        return self.most is None or x.numel() <= self.most * self.in_features

    def forward(self, x: Tensor, *, gated: bool = False) -> Tensor:
        """Multiply, and gate only what `gates` takes. x: [..., K] -> [..., N], gated [..., I]."""
        if not gated:
            return super().forward(x)
        assert self.gates(x)
        return self.by_rows(x, self._gated, self.out_features // 2)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply. x: [n, K] -> [n, N]."""
        # Not by calling it: whoever watches layers would see the same work twice.
        return self.layer.forward(x)

    def reference(self) -> QuantLinear:
        """Give the scheme's own layer."""
        return self.layer.reference() if isinstance(self.layer, KernelLinear) else self.layer
