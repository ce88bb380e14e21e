"""W4A8 as in QoQ, the format of QServe (arXiv 2405.04532): 4-bit weights, 8-bit activations.

Activations: s_a = absmax(a[t, :]) / 127, a8 = round(a / s_a).

Per channel (group_size -1), the zero stays out of the integer product:

    s1 = fp16((max - min) / 15)    z = round(-min / s1)    u = round(w / s1) + z    0 ... 15
    szero = fp16(z * s1)
    y[t, n] = (sum_k a8 * u) * s1[n] * s_a[t] - szero[n] * (sum_k a8) * s_a[t]

QServe's kernel sums the activations before they are rounded. The sum of the rounded ones, here, is
an exact integer, the same for a token however many are read at once, and cancels better: on normal
weights and activations rounding the latter costs 0.5% of the product, against 1.3% with their sum.

Per group, in two levels ("progressive"), 8 bits per channel and then 4 bits per group:

    s1 = fp16(absmax(w[n, :]) / 119)                   q = round(w / s1)           -119 ... 119
    s2 = max(1, round((max(q) - min(q)) / 15))         z = round(-min(q) / s2)     1 ... 16
    u = round(q / s2) + z, 0 ... 15                    z2 = -z * s2, int8
    w8 = u * s2 + z2                                   y[t, n] = (sum_k a8 * w8) * s1[n] * s_a[t]

119 is the protective range: rounding to a multiple of s2 moves q by at most s2 / 2 = 8, clamping
moves it back, so w8 stays within 127. u * s2 alone may pass 127 and wrap; adding z2 wraps it back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.grid import (
    UINT4,
    Fit,
    Grid,
    absmax_scale,
    decode,
    encode,
    num_groups,
    require_group_size,
    round_tokens,
    widen,
)
from quant.integer import int_matmul
from quant.lattice import GridLattice, Lattice
from quant.pack import pack_nibbles, unpack_nibbles
from quant.scheme import QuantLinear, Scheme, require_matrix, stored_tensor, take

PROTECTED = Grid(low=-119, high=119, zero=0)
LARGEST_S2 = 16


@dataclass(frozen=True, kw_only=True)
class W4A8QoQ(Scheme):
    """Weights of 4 bits with a zero, multiplied as integers."""

    group_size: int  # inputs that share a 4-bit scale; -1: a whole row
    range_search: bool  # try other 4-bit ranges and keep the one with the least squared error

    def __post_init__(self) -> None:
        super().__post_init__()
        require_group_size(self.group_size)

    @property
    def label(self) -> str:
        """Name of the format."""
        return "w4a8-qoq-" + ("channel" if self.group_size == -1 else f"g{self.group_size}")

    @property
    def activation_format(self) -> str:
        """Rounded per token, as they come."""
        return "int8"

    @property
    def unsearched(self) -> "W4A8QoQ":
        """Without the range search."""
        return replace(self, range_search=False)

    def lattice(self, weight: Tensor, absmax: Tensor | None = None) -> Lattice:
        """Stored as packed uint8 [N, K / 2], s1_scales [N] and s1_szeros or s2_scales, s2_zeros."""
        require_matrix(weight)
        weight = widen(weight)
        if self.group_size != -1:
            return TwoLevelLattice(
                weight=weight,
                group_size=self.group_size,
                s1=absmax_scale(weight, PROTECTED.high, torch.float16),
                range_search=self.range_search,
            )
        return GridLattice(
            weight=weight,
            group_size=-1,
            grid=UINT4,
            scale_dtype=torch.float16,
            range_search=self.range_search,
            store=_stored_channel,
        )

    def layer(self, stored: Mapping[str, Tensor]) -> QuantLinear:
        """Make the layer from tensors as `pack` gives them."""
        channel = self.group_size == -1
        names = {"s1_szeros"} if channel else {"s2_scales", "s2_zeros"}
        take(stored, {"packed", "s1_scales"} | names, set())
        packed = stored_tensor(stored, "packed", torch.uint8, (-1, -1))
        n, k = packed.shape[0], 2 * packed.shape[1]
        s1_scales = stored_tensor(stored, "s1_scales", torch.float16, (n,))
        if channel:
            szeros = stored_tensor(stored, "s1_szeros", torch.float16, (n,))
            return W4A8QoQChannelLinear(packed, s1_scales, szeros)
        groups = num_groups(k, self.group_size)
        s2_scales = stored_tensor(stored, "s2_scales", torch.int8, (n, groups))
        s2_zeros = stored_tensor(stored, "s2_zeros", torch.int8, (n, groups))
        codes = unpack_nibbles(packed).short().view(n, groups, -1)
        highest = (codes * s2_scales.unsqueeze(-1) + s2_zeros.unsqueeze(-1)).abs().max()
        if highest > torch.iinfo(torch.int8).max:
            raise ValueError(f"u * s2 + z2 must stay within 127, got {highest.item()}")
        return W4A8QoQGroupLinear(packed, s1_scales, s2_scales, s2_zeros)


@dataclass(frozen=True, kw_only=True)
class TwoLevelLattice(Lattice):
    """Rounds to 8 bits on a row's scale, then to 4 bits on a group's.

    The row's scale is the given weight's. Should an algorithm change a weight on the way, level 1
    clamps it into the protective range, so w8 stays within 127 whatever comes.
    """

    s1: Tensor  # [N, 1] float16
    range_search: bool

    def fit(self, values: Tensor) -> Fit:
        """Choose s2 and z of each group."""
        exact = values / self.s1.unsqueeze(-1)
        q = _clamped(exact)
        low, high = q.amin(-1, keepdim=True).clamp_(max=0), q.amax(-1, keepdim=True).clamp_(min=0)
        best = _level_2(low, ((high - low) / UINT4.high).round_().clamp_(min=1))
        return _searched(q, exact, best, low, high) if self.range_search else best

    def encode(self, values: Tensor, placed: Fit) -> Tensor:
        """Round twice."""
        return encode(_clamped(values / self.s1.unsqueeze(-1)), UINT4, placed)

    def decode(self, codes: Tensor, placed: Fit) -> Tensor:
        """Give w8 * s1."""
        return decode(codes, placed) * self.s1.float().unsqueeze(-1)

    def stored(self, codes: Tensor, placed: Fit) -> dict[str, Tensor]:
        """Give packed, s1_scales, s2_scales and s2_zeros."""
        return {
            "packed": pack_nibbles(codes.flatten(1)),
            "s1_scales": self.s1.flatten(),
            "s2_scales": placed.scale.squeeze(-1).to(torch.int8),
            "s2_zeros": (-placed.zero * placed.scale).squeeze(-1).to(torch.int8),
        }


class W4A8QoQChannelLinear(QuantLinear):
    """Multiply unsigned codes; take the zero off afterwards, by the sum of each token."""

    packed: Tensor
    s1_scales: Tensor
    s1_szeros: Tensor

    def __init__(self, packed: Tensor, s1_scales: Tensor, s1_szeros: Tensor) -> None:
        super().__init__(in_features=2 * packed.shape[1], out_features=packed.shape[0])
        self.register_buffer("packed", packed)
        self.register_buffer("s1_scales", s1_scales)
        self.register_buffer("s1_szeros", s1_szeros)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply. x: [..., K] -> [..., N]."""
        tokens = round_tokens(x.reshape(-1, self.in_features))
        dtype = tokens.scale.dtype
        y = int_matmul(tokens.codes, unpack_nibbles(self.packed)).to(dtype)
        sums = tokens.codes.sum(-1, keepdim=True).to(dtype)
        y.mul_(self.s1_scales).sub_(sums * self.s1_szeros).mul_(tokens.scale)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def dequantize(self) -> Tensor:
        """Give the weight as stored, [N, K] float32."""
        codes = unpack_nibbles(self.packed).float()
        return codes * self.s1_scales.float().unsqueeze(-1) - self.s1_szeros.float().unsqueeze(-1)


class W4A8QoQGroupLinear(QuantLinear):
    """Open the codes to int8, multiply integers, scale after."""

    packed: Tensor
    s1_scales: Tensor
    s2_scales: Tensor
    s2_zeros: Tensor

    def __init__(
        self, packed: Tensor, s1_scales: Tensor, s2_scales: Tensor, s2_zeros: Tensor
    ) -> None:
        super().__init__(in_features=2 * packed.shape[1], out_features=packed.shape[0])
        self.register_buffer("packed", packed)
        self.register_buffer("s1_scales", s1_scales)
        self.register_buffer("s2_scales", s2_scales)
        self.register_buffer("s2_zeros", s2_zeros)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply. x: [..., K] -> [..., N]."""
        tokens = round_tokens(x.reshape(-1, self.in_features))
        y = int_matmul(tokens.codes, self.opened()).to(tokens.scale.dtype)
        y.mul_(self.s1_scales).mul_(tokens.scale)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def dequantize(self) -> Tensor:
        """Give the weight as stored, [N, K] float32."""
        return self.opened().float() * self.s1_scales.float().unsqueeze(-1)

    def opened(self) -> Tensor:
        """Give w8, the weight that meets the activations. [N, K] int8."""
        codes = unpack_nibbles(self.packed).view(*self.s2_scales.shape, -1)
        codes *= self.s2_scales.unsqueeze(-1)  # wraps modulo 256, as the kernel's bytes do
        codes += self.s2_zeros.unsqueeze(-1)
        return codes.flatten(1)


def _stored_channel(codes: Tensor, placed: Fit) -> dict[str, Tensor]:
    szeros = placed.zero * placed.scale
    if not bool(torch.isfinite(szeros).all()):
        raise ValueError("zero times scale must fit float16, got a weight with too wide a range")
    return {
        "packed": pack_nibbles(codes.flatten(1)),
        "s1_scales": placed.scale.flatten(),
        "s1_szeros": szeros.flatten(),
    }


def _clamped(exact: Tensor) -> Tensor:
    return exact.round().clamp_(PROTECTED.low, PROTECTED.high)


def _level_2(low: Tensor, scale: Tensor) -> Fit:
    zero = (-low / scale).round_().clamp_(UINT4.low, UINT4.high)
    return Fit(scale, zero.to(torch.int8))


def _searched(q: Tensor, exact: Tensor, best: Fit, low: Tensor, high: Tensor) -> Fit:
    least = _squared_error(q, exact, best)
    for size in range(1, LARGEST_S2 + 1):
        # A scale too small for the whole range clips both ends alike.
        shrink = (size * UINT4.high / (high - low).clamp(min=1)).clamp_(max=1)
        found = _level_2(low * shrink, torch.full_like(best.scale, size))
        error = _squared_error(q, exact, found)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, found.scale, best.scale)
        best = Fit(scale, torch.where(better, found.zero, best.zero))
    return best


def _squared_error(q: Tensor, exact: Tensor, fit: Fit) -> Tensor:
    opened = (encode(q, UINT4, fit) - fit.zero) * fit.scale
    return (opened - exact).square_().sum(-1, keepdim=True)
