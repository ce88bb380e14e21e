"""W8A8: 8-bit weights per out-channel, 8-bit activations per token (SmoothQuant, arXiv 2211.10438).

    s_w = fp16(absmax(w[n, :]) / 127)       w8 = round(w / s_w)      -127 ... 127
    s_a = absmax(a[t, :]) / 127             a8 = round(a / s_a)
    y[t, n] = (sum_k a8[t, k] * w8[n, k]) * s_w[n] * s_a[t]          int32 sum, float epilogue

With smoothing a = x / smooth and w = weight * smooth, where for each input channel
smooth = absmax(x)^alpha / absmax(weight)^(1 - alpha): outliers of the activations, known from
calibration, move into the weight. DeepCompressor's `smoothquant-dynamic` takes alpha 0.85. It folds
the division into the norm before; here it is explicit, which is the same number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quant.grid import INT8, Fit, decode, round_tokens, widen
from quant.integer import int_matmul
from quant.lattice import GridLattice
from quant.scheme import (
    SCALE_DTYPES,
    QuantLinear,
    Scheme,
    require_matrix,
    stored_tensor,
    take,
)


@dataclass(frozen=True, kw_only=True)
class W8A8(Scheme):
    """Integers of 8 bits on both sides of the product."""

    smooth_alpha: (
        float | None
    )  # share of the outliers' range moved into the weight; None: no smoothing

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smooth_alpha is not None and not 0 <= self.smooth_alpha <= 1:
            raise ValueError(
                f"smooth_alpha must be null or within 0 ... 1, got {self.smooth_alpha}"
            )

    @property
    def label(self) -> str:
        """Name of the format."""
        return "w8a8" if self.smooth_alpha is None else "w8a8-smooth"

    @property
    def activation_format(self) -> str:
        """Rounded per token, as they come."""
        return "int8"

    @property
    def needs_absmax(self) -> bool:
        """Whether activations are smoothed."""
        return self.smooth_alpha is not None

    def lattice(self, weight: Tensor, absmax: Tensor | None = None) -> GridLattice:
        """Stored as weight int8 [N, K], scales float16 [N] and perhaps smooth float32 [K]."""
        require_matrix(weight)
        weight = widen(weight)
        smooth = None
        if self.smooth_alpha is not None:
            smooth = _smooth(weight, absmax, self.smooth_alpha)
            weight = weight * smooth
        return GridLattice(
            weight=weight,
            group_size=-1,
            smooth=smooth,
            grid=INT8,
            scale_dtype=torch.float16,
            range_search=False,
            store=partial(_stored, smooth),
        )

    def layer(self, stored: Mapping[str, Tensor]) -> "W8A8Linear":
        """Make the layer from tensors as `pack` gives them."""
        take(stored, {"weight", "scales"} | ({"smooth"} if self.needs_absmax else set()), set())
        weight = stored_tensor(stored, "weight", torch.int8, (-1, -1))
        n, k = weight.shape
        scales = stored_tensor(stored, "scales", SCALE_DTYPES, (n,))
        smooth = None
        if self.needs_absmax:
            smooth = stored_tensor(stored, "smooth", torch.float32, (k,))
            if not bool(((smooth > 0) & torch.isfinite(smooth)).all()):
                raise ValueError("smooth must be positive and finite, got other values")
        return W8A8Linear(weight, scales, smooth)


class W8A8Linear(QuantLinear):
    """Multiply integers; scale after."""

    weight: Tensor
    scales: Tensor
    smooth: Tensor | None

    def __init__(self, weight: Tensor, scales: Tensor, smooth: Tensor | None) -> None:
        super().__init__(in_features=weight.shape[1], out_features=weight.shape[0])
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("smooth", smooth)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply. x: [..., K] -> [..., N]."""
        a = x.reshape(-1, self.in_features)
        tokens = round_tokens(a if self.smooth is None else widen(a) / self.smooth)
        y = int_matmul(tokens.codes, self.weight).to(tokens.scale.dtype)
        y.mul_(self.scales).mul_(tokens.scale)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def dequantize(self) -> Tensor:
        """Give the weight that meets unsmoothed activations, [N, K] float32."""
        scale = self.scales.unsqueeze(-1)
        weight = decode(self.weight, Fit(scale, torch.zeros_like(scale, dtype=torch.int8)))
        return weight if self.smooth is None else weight / self.smooth


def _stored(smooth: Tensor | None, codes: Tensor, placed: Fit) -> dict[str, Tensor]:
    stored = {"weight": codes.flatten(1), "scales": placed.scale.flatten()}
    return stored if smooth is None else stored | {"smooth": smooth}


def _smooth(weight: Tensor, absmax: Tensor | None, alpha: float) -> Tensor:
    k = weight.shape[1]
    if absmax is None or absmax.shape != (k,):
        got = "none" if absmax is None else f"shape {list(absmax.shape)}"
        raise ValueError(f"smoothing needs absmax of shape [{k}] from calibration, got {got}")
    if not bool((torch.isfinite(absmax) & (absmax >= 0)).all()):
        raise ValueError("absmax must be finite and not negative, got other values")
    reach = absmax.to(weight)
    heights = weight.abs().amax(0)
    smooth = (reach**alpha / heights ** (1 - alpha)).float()
    # A channel that never fired, or that no weight reads, has no range to move.
    usable = (smooth > 0) & torch.isfinite(smooth) & (reach > 0) & (heights > 0)
    return torch.where(usable, smooth, torch.ones_like(smooth))
