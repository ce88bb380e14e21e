"""Weights of few bits, activations as they are (GPTQ, arXiv 2210.17323; AWQ, 2306.00978).

With codes of b bits, 0 ... top = 2^b - 1:

    symmetric    s = fp16(2 * absmax / top)        zero = 2^(b - 1)    c = round(w / s) + zero
    asymmetric   s = fp16((max - min) / top)       zero = round(-min / s)
    y = x @ ((c - zero) * s).T                     all in x's dtype

min and max, of a group of `group_size` inputs of one output, always include 0. Stored: packed
codes, scales [N, groups] and, when asymmetric, zeros uint8 [N, groups]. A byte of `packed` holds
one 8-bit code or two of 4 bits (see quant.pack). `pack` gives float16 scales; a checkpoint may
bring bfloat16 or float32 ones, which are kept.

GPTQ with act-order makes groups of inputs that are no neighbours. Then order, int32 [K], is stored
as well: column j of `packed` belongs to input order[j], and the inputs are gathered before the
product.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.grid import Fit, Grid, num_groups, require_group_size, widen
from quant.lattice import GridLattice
from quant.pack import pack_nibbles, unpack_nibbles
from quant.scheme import (
    SCALE_DTYPES,
    QuantLinear,
    Scheme,
    require_matrix,
    stored_tensor,
    take,
)


@dataclass(frozen=True, kw_only=True)
class WeightOnly(Scheme):
    """Integer weights, opened to x's dtype before the product."""

    group_size: int  # inputs that share a scale; -1: a whole row
    symmetric: bool  # zero fixed in the middle of the codes, or chosen and stored per group
    range_search: bool  # try tighter clipping ranges and keep the one with the least squared error

    def __post_init__(self) -> None:
        super().__post_init__()
        require_group_size(self.group_size)

    @property
    @abstractmethod
    def bits(self) -> int:
        """Width of a code: 4 or 8."""

    @property
    def label(self) -> str:
        """Name of the format."""
        groups = "channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"w{self.bits}a16-{groups}" + ("" if self.symmetric else "-asym")

    @property
    def unsearched(self) -> "WeightOnly":
        """Without the range search."""
        return replace(self, range_search=False)

    def lattice(self, weight: Tensor, absmax: Tensor | None = None) -> GridLattice:
        """Stored as packed uint8 [N, K * bits / 8], scales and perhaps zeros [N, groups]."""
        require_matrix(weight)
        half = 2 ** (self.bits - 1)
        return GridLattice(
            weight=widen(weight),
            group_size=self.group_size,
            takes_order=True,
            grid=Grid(low=-half, high=half - 1, zero=0 if self.symmetric else None),
            scale_dtype=torch.float16,
            range_search=self.range_search,
            store=self._stored,
        )

    def layer(self, stored: Mapping[str, Tensor]) -> "WeightOnlyLinear":
        """Make the layer from tensors as `pack` gives them, with `order` or without."""
        take(stored, {"packed", "scales"} | (set() if self.symmetric else {"zeros"}), {"order"})
        packed = stored_tensor(stored, "packed", torch.uint8, (-1, -1))
        n, k = packed.shape[0], packed.shape[1] * 8 // self.bits
        groups = (n, num_groups(k, self.group_size))
        scales = stored_tensor(stored, "scales", SCALE_DTYPES, groups)
        zeros = None if self.symmetric else stored_tensor(stored, "zeros", torch.uint8, groups)
        if zeros is not None and bool((zeros > 2**self.bits - 1).any()):
            raise ValueError(f"zeros must be 0 ... {2**self.bits - 1}, got {zeros.max().item()}")
        order = stored_tensor(stored, "order", torch.int32, (k,)) if "order" in stored else None
        if order is not None and not torch.equal(
            order.sort().values, torch.arange(k, dtype=torch.int32, device=order.device)
        ):
            raise ValueError(f"order must name each of the {k} inputs once, got repeated or others")
        return WeightOnlyLinear(packed, scales, zeros, order, bits=self.bits)

    def _stored(self, codes: Tensor, placed: Fit) -> dict[str, Tensor]:
        # The grid's codes are signed, around 0; stored ones count up from 0.
        half = 2 ** (self.bits - 1)
        unsigned = codes.flatten(1) + half if self.bits == 4 else codes.flatten(1) ^ -half
        packed = pack_nibbles(unsigned) if self.bits == 4 else unsigned.view(torch.uint8)
        stored = {"packed": packed, "scales": placed.scale.squeeze(-1)}
        if not self.symmetric:
            stored["zeros"] = (placed.zero.squeeze(-1).short() + half).to(torch.uint8)
        return stored


class WeightOnlyLinear(QuantLinear):
    """Open the codes, then multiply in x's dtype."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        order: Tensor | None,
        *,
        bits: int,
    ) -> None:
        n, width = packed.shape
        super().__init__(in_features=width * 8 // bits, out_features=n)
        self.bits = bits
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply. x: [..., K] -> [..., N]."""
        gathered = x if self.order is None else x.index_select(-1, self.order)
        return F.linear(gathered, self.opened(x.dtype))

    def dequantize(self) -> Tensor:
        """Give the weight as stored, its columns in the order of the inputs. [N, K] float32."""
        weight = self.opened(torch.float32)
        return weight if self.order is None else weight[:, self.order.argsort()]

    def opened(self, dtype: torch.dtype) -> Tensor:
        """Give the weight in a dtype, its columns as they are stored. [N, K]."""
        # In place and narrow for as long as it can: fresh pages cost more than the arithmetic.
        steps = self._steps_4() if self.bits == 4 else self._steps_8()
        weight = steps.view(*self.scales.shape, -1).to(dtype)
        weight *= self.scales.to(dtype).unsqueeze(-1)
        return weight.flatten(1)

    def _steps_4(self) -> Tensor:
        codes = unpack_nibbles(self.packed).view(*self.scales.shape, -1)
        codes -= 8 if self.zeros is None else self.zeros.view(torch.int8).unsqueeze(-1)
        return codes

    def _steps_8(self) -> Tensor:
        if self.zeros is None:
            return (self.packed ^ 128).view(torch.int8)  # c - 128, as its bits stand
        codes = self.packed.view(*self.scales.shape, -1).short()  # a difference has 9 bits
        codes -= self.zeros.unsqueeze(-1)
        return codes
