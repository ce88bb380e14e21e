"""FP8: e4m3 weights per out-channel, e4m3 activations per token (arXiv 2209.05433).

    s_w = absmax(w[n, :]) / 448             w8 = e4m3(w / s_w)       float32 scale
    s_a = absmax(a[t, :]) / 448             a8 = e4m3(a / s_a)
    y[t, n] = (sum_k a8[t, k] * w8[n, k]) * s_w[n] * s_a[t]          float32 sum, float epilogue

e4m3 is torch's float8_e4m3fn: 3 bits of mantissa, largest value 448, no infinities.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.grid import E4M3_MAX, Fit, absmax_scale, round_tokens_e4m3, widen
from quant.lattice import Lattice
from quant.scheme import (
    SCALE_DTYPES,
    QuantLinear,
    Scheme,
    require_matrix,
    stored_tensor,
    take,
)


@dataclass(frozen=True, kw_only=True)
class FP8(Scheme):
    """Floats of 8 bits on both sides of the product."""

    @property
    def label(self) -> str:
        """Name of the format."""
        return "fp8"

    @property
    def activation_format(self) -> str:
        """Rounded per token, as they come."""
        return "fp8"

    def lattice(self, weight: Tensor, absmax: Tensor | None = None) -> "FP8Lattice":
        """Stored as weight float8_e4m3fn [N, K] and scales float32 [N]."""
        require_matrix(weight)
        return FP8Lattice(weight=widen(weight), group_size=-1)

    def layer(self, stored: Mapping[str, Tensor]) -> "FP8Linear":
        """Make the layer from tensors as `pack` gives them."""
        take(stored, {"weight", "scales"}, set())
        weight = stored_tensor(stored, "weight", torch.float8_e4m3fn, (-1, -1))
        if bool((weight.view(torch.uint8) & 0x7F == 0x7F).any()):
            raise ValueError("weight must be finite, got NaNs")
        return FP8Linear(weight, stored_tensor(stored, "scales", SCALE_DTYPES, weight.shape[:1]))


@dataclass(frozen=True, kw_only=True)
class FP8Lattice(Lattice):
    """Bytes of e4m3, as int8, times a scale."""

    def fit(self, values: Tensor) -> Fit:
        """Bring the largest magnitude to 448."""
        scale = absmax_scale(values, E4M3_MAX, torch.float32)
        return Fit(scale, torch.zeros_like(scale, dtype=torch.int8))

    def encode(self, values: Tensor, placed: Fit) -> Tensor:
        """Round to e4m3."""
        # A scale that underflowed a little could push past 448, which e4m3 would make a NaN.
        steps = (values / placed.scale).clamp_(-E4M3_MAX, E4M3_MAX)
        return steps.to(torch.float8_e4m3fn).view(torch.int8)

    def decode(self, codes: Tensor, placed: Fit) -> Tensor:
        """Give e4m3 * scale."""
        return _wide_e4m3(codes, torch.float32) * placed.scale

    def stored(self, codes: Tensor, placed: Fit) -> dict[str, Tensor]:
        """Give weight and scales."""
        return {
            "weight": codes.flatten(1).view(torch.float8_e4m3fn),
            "scales": placed.scale.flatten(),
        }


class FP8Linear(QuantLinear):
    """Multiply e4m3 values in float32 (float64 for float64 inputs); scale after."""

    weight: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        super().__init__(in_features=weight.shape[1], out_features=weight.shape[0])
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply. x: [..., K] -> [..., N]."""
        tokens = round_tokens_e4m3(x.reshape(-1, self.in_features))
        dtype = tokens.scale.dtype
        y = F.linear(_wide_e4m3(tokens.codes, dtype), _wide_e4m3(self.weight, dtype))
        y.mul_(self.scales).mul_(tokens.scale)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def dequantize(self) -> Tensor:
        """Give the weight as stored, [N, K] float32."""
        return _wide_e4m3(self.weight, torch.float32) * self.scales.unsqueeze(-1)


def _wide_e4m3(values: Tensor, dtype: torch.dtype) -> Tensor:
    # e4m3's bits in float16's places are the value / 256, subnormals included; the sign, copied by
    # widening, is taken out of bit 14. [768, 256]: 60 us on one core, torch's conversion 800 us.
    bits = values.view(torch.int8).to(torch.int16)
    bits <<= 7
    bits &= ~0x4000
    return bits.view(torch.float16).to(dtype).mul_(256.0)
