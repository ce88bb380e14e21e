"""W4A8 as in QQQ (arXiv 2406.09904): 4-bit weights made 8-bit integers, 8-bit activations.

Activations: s_a = absmax(a[t, :]) / 127, a8 = round(a / s_a).

Per channel (group_size -1), codes -7 ... 7 placed in the high half of a byte:

    s = absmax(w[n, :]) / 7        c = round(w / s)      s_channel = s / 16, float32
    w8 = 16 * c                    y[t, n] = (sum_k a8 * w8) * s_channel[n] * s_a[t]

Per group, codes 0 ... 15 around 8, brought to 8 bits again by a rounded product:

    s = 2 * absmax(group) / 15     c = round(w / s) + 8
    s_channel = max_k |(c - 8) * s| / 127, float32       s_group = fp16(s / s_channel)
    w8 = round((c - 8) * s_group)  y as above

The kernel gets w8 by one fused multiply-add, so the product is rounded once, ties to even
(`dequant_per_group` in QQQ's csrc/qqq_gemm.cu); float32 holds it exactly, so does this file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.grid import (
    INT4,
    INT8_MAX,
    UINT4_AROUND_8,
    Fit,
    absmax_scale,
    decode,
    num_groups,
    require_group_size,
    round_tokens,
    widen,
)
from quant.integer import int_matmul
from quant.lattice import GridLattice
from quant.pack import pack_nibbles, unpack_high_nibbles, unpack_nibbles
from quant.scheme import QuantLinear, Scheme, require_matrix, stored_tensor, take


@dataclass(frozen=True, kw_only=True)
class W4A8QQQ(Scheme):
    """Weights of 4 bits, opened to 8-bit integers before an integer product."""

    group_size: int  # inputs that share a 4-bit scale; -1: a whole row
    range_search: bool  # try tighter clipping ranges and keep the one with the least squared error

    def __post_init__(self) -> None:
        super().__post_init__()
        require_group_size(self.group_size)

    @property
    def label(self) -> str:
        """Name of the format."""
        return "w4a8-qqq-" + ("channel" if self.group_size == -1 else f"g{self.group_size}")

    @property
    def activation_format(self) -> str:
        """Rounded per token, as they come."""
        return "int8"

    @property
    def unsearched(self) -> "W4A8QQQ":
        """Without the range search."""
        return replace(self, range_search=False)

    def lattice(self, weight: Tensor, absmax: Tensor | None = None) -> GridLattice:
        """Stored as packed uint8 [N, K / 2], s_channel [N] and, per group, s_group [N, groups].

        The second rounding of groups, to 8 bits, waits for all codes: it is not in the lattice.
        """
        require_matrix(weight)
        channel = self.group_size == -1
        return GridLattice(
            weight=widen(weight),
            group_size=self.group_size,
            grid=INT4 if channel else UINT4_AROUND_8,
            scale_dtype=torch.float32,
            range_search=self.range_search,
            store=_stored_channel if channel else _stored_groups,
        )

    def layer(self, stored: Mapping[str, Tensor]) -> "W4A8QQQLinear":
        """Make the layer from tensors as `pack` gives them."""
        take(
            stored,
            {"packed", "s_channel"} | ({"s_group"} if self.group_size != -1 else set()),
            set(),
        )
        packed = stored_tensor(stored, "packed", torch.uint8, (-1, -1))
        n, k = packed.shape[0], 2 * packed.shape[1]
        s_channel = stored_tensor(stored, "s_channel", torch.float32, (n,))
        if self.group_size == -1:
            return W4A8QQQLinear(packed, s_channel, None)
        groups = num_groups(k, self.group_size)
        s_group = stored_tensor(stored, "s_group", torch.float16, (n, groups))
        highest = _opened_float(packed, s_group).abs().max()
        if not bool(highest <= INT8_MAX):
            raise ValueError(f"codes times s_group must stay within 127, got {highest.item():g}")
        return W4A8QQQLinear(packed, s_channel, s_group)


class W4A8QQQLinear(QuantLinear):
    """Open the codes to int8, multiply integers, scale after."""

    packed: Tensor
    s_channel: Tensor
    s_group: Tensor | None

    def __init__(self, packed: Tensor, s_channel: Tensor, s_group: Tensor | None) -> None:
        super().__init__(in_features=2 * packed.shape[1], out_features=packed.shape[0])
        self.register_buffer("packed", packed)
        self.register_buffer("s_channel", s_channel)
        self.register_buffer("s_group", s_group)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply. x: [..., K] -> [..., N]."""
        tokens = round_tokens(x.reshape(-1, self.in_features))
        y = int_matmul(tokens.codes, self.opened()).to(tokens.scale.dtype)
        y.mul_(self.s_channel).mul_(tokens.scale)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def dequantize(self) -> Tensor:
        """Give the weight as stored, [N, K] float32."""
        return self.opened().float() * self.s_channel.unsqueeze(-1)

    def opened(self) -> Tensor:
        """Give w8, the weight that meets the activations. [N, K] int8."""
        if self.s_group is None:
            return unpack_high_nibbles(self.packed)
        return _opened_float(self.packed, self.s_group).to(torch.int8)


def _stored_channel(codes: Tensor, placed: Fit) -> dict[str, Tensor]:
    return {"packed": pack_nibbles(codes.flatten(1)), "s_channel": placed.scale.flatten() / 16}


def _stored_groups(codes: Tensor, placed: Fit) -> dict[str, Tensor]:
    rounded = decode(codes, placed)
    s_channel = absmax_scale(rounded.flatten(1), INT8_MAX, torch.float32)
    # An empty group's scale is arbitrary and may be far out of float16's range.
    s_group = (placed.scale.squeeze(-1) / s_channel).to(torch.float16)
    s_group[(rounded == 0).all(-1)] = 1
    return {
        "packed": pack_nibbles(codes.flatten(1)),
        "s_channel": s_channel.flatten(),
        "s_group": s_group,
    }


def _opened_float(packed: Tensor, s_group: Tensor) -> Tensor:
    codes = unpack_nibbles(packed).view(*s_group.shape, -1)
    codes -= 8
    weight = codes.float()
    weight *= s_group.float().unsqueeze(-1)
    return weight.round_().flatten(1)
