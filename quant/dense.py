"""The weight as it is: the baseline of every comparison."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from quant.lattice import Lattice
from quant.scheme import QuantLinear, Scheme, require_matrix, stored_tensor, take


@dataclass(frozen=True, kw_only=True)
class Dense(Scheme):
    """Keep the weight in the dtype it comes in."""

    @property
    def label(self) -> str:
        """Name of the format."""
        return "dense"

    @property
    def by_row(self) -> bool:
        """Gives the weight itself."""
        return False

    def lattice(self, weight: Tensor, absmax: Tensor | None = None) -> Lattice:
        """Refuse: nothing is rounded."""
        raise ValueError("scheme must round weights, got dense, which keeps them as they are")

    def pack(self, weight: Tensor, absmax: Tensor | None = None) -> dict[str, Tensor]:
        """Give the weight itself, not a copy. weight: [N, K]."""
        require_matrix(weight)
        return {"weight": weight.detach()}

    def layer(self, stored: Mapping[str, Tensor]) -> "DenseLinear":
        """Make the layer. weight: [N, K] floating point."""
        take(stored, {"weight"}, set())
        weight = stored["weight"]
        require_matrix(weight)
        return DenseLinear(stored_tensor(stored, "weight", weight.dtype, (-1, -1)))


class DenseLinear(QuantLinear):
    """Multiply by a floating-point weight in x's dtype."""

    weight: Tensor
    castable: ClassVar[bool] = True

    def __init__(self, weight: Tensor) -> None:
        super().__init__(in_features=weight.shape[1], out_features=weight.shape[0])
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply. x: [..., K] -> [..., N]."""
        return F.linear(x, self.weight.to(x.dtype))

    def dequantize(self) -> Tensor:
        """Give the weight, [N, K] float32."""
        return self.weight.float()
