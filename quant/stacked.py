"""Several layers of the same input as one, where their tensors cannot be joined."""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from quant.scheme import QuantLinear


class StackedLinear(QuantLinear):
    """Outputs of the parts, one after the other: parts of unlike formats or input orders."""

    def __init__(self, parts: Sequence[QuantLinear]) -> None:
        if len(widths := {part.in_features for part in parts}) > 1:
            raise ValueError(f"layers of the same inputs must have one K, got {sorted(widths)}")
        super().__init__(
            in_features=parts[0].in_features,
            out_features=sum(part.out_features for part in parts),
        )
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply. x: [..., K] -> [..., N]."""
        # Not by calling them: whoever watches layers would see the same work twice.
        return torch.cat([part.forward(x) for part in self._layers()], dim=-1)

    def dequantize(self) -> Tensor:
        """Give the weight as stored, [N, K] float32."""
        return torch.cat([part.dequantize() for part in self._layers()])

    @property
    def kernel(self) -> str:
        """Those of the parts, each named once."""
        return "+".join(dict.fromkeys(part.kernel for part in self._layers()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for part in self._layers():
            part._apply(fn, recurse)
        return self

    def _layers(self) -> list[QuantLinear]:
        return [part for part in self.parts if isinstance(part, QuantLinear)]
