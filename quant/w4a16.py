"""W4A16: 4-bit weights, activations as they are (GPTQ, arXiv 2210.17323; AWQ, 2306.00978).

    symmetric    s = fp16(2 * absmax / 15)         zero = 8            c = round(w / s) + 8
    asymmetric   s = fp16((max - min) / 15)        zero = round(-min / s)
    y = x @ ((c - zero) * s).T                     all in x's dtype, codes 0 ... 15

min and max, of a group of `group_size` inputs of one output, always include 0. Stored: packed
codes (see quant.pack), scales float16 [N, groups] and, when asymmetric, zeros uint8 [N, groups].
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.grid import (
    UINT4,
    UINT4_AROUND_8,
    encode,
    fit,
    num_groups,
    pieces,
    require_group_size,
)
from quant.pack import pack_nibbles, unpack_nibbles
from quant.scheme import QuantLinear, Scheme, require_matrix, stored_tensor, take


@dataclass(frozen=True, kw_only=True)
class W4A16(Scheme):
    """Weights of 4 bits, opened to x's dtype before the product."""

    group_size: int  # inputs that share a scale; -1: a whole row
    symmetric: bool  # zero fixed at code 8, or chosen and stored per group
    range_search: bool  # try tighter clipping ranges and keep the one with the least squared error

    def __post_init__(self) -> None:
        require_group_size(self.group_size)

    @property
    def label(self) -> str:
        """Name of the format."""
        groups = "channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"w4a16-{groups}" + ("" if self.symmetric else "-asym")

    def pack(self, weight: Tensor, absmax: Tensor | None = None) -> dict[str, Tensor]:
        """Give packed uint8 [N, K / 2], scales and perhaps zeros [N, groups]."""
        require_matrix(weight)
        grid = UINT4_AROUND_8 if self.symmetric else UINT4
        values = pieces(weight, self.group_size)
        placed = fit(values, grid, scale_dtype=torch.float16, range_search=self.range_search)
        codes = encode(values, grid, placed)
        stored = {"packed": pack_nibbles(codes.flatten(1)), "scales": placed.scale.squeeze(-1)}
        if not self.symmetric:
            stored["zeros"] = placed.zero.squeeze(-1).to(torch.uint8)
        return stored

    def layer(self, stored: Mapping[str, Tensor]) -> "W4A16Linear":
        """Make the layer from tensors as `pack` gives them."""
        take(stored, {"packed", "scales"} | (set() if self.symmetric else {"zeros"}), set())
        packed = stored_tensor(stored, "packed", torch.uint8, (-1, -1))
        n, k = packed.shape[0], 2 * packed.shape[1]
        groups = (n, num_groups(k, self.group_size))
        scales = stored_tensor(stored, "scales", torch.float16, groups)
        zeros = None if self.symmetric else stored_tensor(stored, "zeros", torch.uint8, groups)
        if zeros is not None and bool((zeros > UINT4.high).any()):
            raise ValueError(f"zeros must be 0 ... 15, got {zeros.max().item()}")
        return W4A16Linear(packed, scales, zeros)


class W4A16Linear(QuantLinear):
    """Open the codes, then multiply in x's dtype."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, packed: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
        super().__init__(in_features=2 * packed.shape[1], out_features=packed.shape[0])
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply. x: [..., K] -> [..., N]."""
        return F.linear(x, self._opened(x.dtype))

    def dequantize(self) -> Tensor:
        """Give the weight as stored, [N, K] float32."""
        return self._opened(torch.float32)

    def _opened(self, dtype: torch.dtype) -> Tensor:
        # In place and 8-bit for as long as it can: fresh pages cost more than the arithmetic.
        codes = unpack_nibbles(self.packed).view(*self.scales.shape, -1)
        codes -= 8 if self.zeros is None else self.zeros.view(torch.int8).unsqueeze(-1)
        weight = codes.to(dtype)
        weight *= self.scales.to(dtype).unsqueeze(-1)
        return weight.flatten(1)
