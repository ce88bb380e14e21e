"""A layer's tensors in the layout of humming, and back."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quant.kernels.layout import Layout
from quant.pack import pack_nibbles, unpack_nibbles

ROWS = 64  # of a tile, by what `transform_humming_weight` asks of N


class Number(Protocol):
    """humming's description of a number format."""

    num_bits: int


class Config(Protocol):
    """What is asked of `humming.config.LayerConfig`."""

    shape_n: int
    shape_k: int
    a_dtype: Number
    b_dtype: Number
    should_apply_bs_on_c: bool
    use_packed_k_layout: bool
    use_native_dequant: bool
    use_raw_weight: bool
    use_flat_weight: bool
    use_ldmatrix_dequant: bool

    def to_str(self) -> str:
        """Give it as JSON."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A layer's configuration, its tensors until a layer takes them, and the way back."""

    config: Config
    tensors: dict[str, Tensor]
    layout: Layout
    groups: int

    def codes(self, weight: Tensor, n: int, k: int) -> Tensor:
        """Give the codes, [N, K * bits / 8] uint8."""
        return self.layout.unpack(weight, n, k)

    def scales(self, held: Tensor) -> Tensor:
        """Give the scales, [N, groups]."""
        return self._unmixed(held.flatten(), self.groups, on_sums=self.config.should_apply_bs_on_c)

    def zeros(self, held: Tensor) -> Tensor:
        """Give the zeros, [N, groups] uint8."""
        stored = held.contiguous().view(-1).view(torch.uint8)
        codes = unpack_nibbles(stored).view(torch.uint8) if self.layout.bits == 4 else stored
        return self._unmixed(codes, self.groups, on_sums=False)

    def channel(self, held: Tensor) -> Tensor:
        """Give the channels' scales, [N]."""
        return self._unmixed(held.flatten(), 1, on_sums=True).flatten()

    def _unmixed(self, held: Tensor, groups: int, *, on_sums: bool) -> Tensor:
        """Put values back, by sending their numbers the way that they went."""
        from humming.transform import transform_humming_weight_scale

        numbers = torch.arange(held.numel(), dtype=torch.int32, device=held.device)
        sent = transform_humming_weight_scale(numbers.view(-1, groups), to_apply_on_c=on_sums)
        values = torch.empty_like(held)
        values[sent.flatten().long()] = held
        return values.view(-1, groups)


def pack(
    *,
    codes: Tensor,
    bits: int,
    number: str,
    scales: Tensor,
    zeros: Tensor | None,
    channel: Tensor | None,
    dtype: str,
    rounds: str | None,
) -> Packed:
    """Lay tensors out, on their GPU.

    codes: [N, K * bits / 8] uint8. number: humming's name of what they are. scales: [N, groups] in
    `dtype`. zeros: [N, groups] uint8. channel: [N] in `dtype`. rounds: of the activations.
    """
    from humming.config import LayerConfig
    from humming.transform import transform_humming_tensors

    n, k = codes.shape[0], codes.shape[1] * 8 // bits
    groups = scales.shape[1]
    with torch.cuda.device(codes.device):
        config = LayerConfig(
            shape_n=n,
            shape_k=k,
            a_dtype=rounds or dtype,
            b_dtype=number,
            c_dtype=dtype,
            bs_dtype=dtype,
            weight_scale_group_size=0 if groups == 1 else k // groups,
            weight_scale_2_type=None if channel is None else "channel",
            has_zero_point=zeros is not None,
        )
        given = {"weight": codes.view(torch.int32), "weight_scale": scales.contiguous()}
        if zeros is not None:
            given["zero_point"] = _packed_down(zeros, bits)
        if channel is not None:
            given["weight_scale_2"] = channel
        made = transform_humming_tensors(config, given)
    names = {"weight_scale": "scales", "zero_point": "zeros", "weight_scale_2": "channel"}
    return Packed(
        config=config,
        tensors={names.get(name, name): tensor for name, tensor in made.items()},
        layout=_layout(config, bits),
        groups=groups,
    )


def _layout(config: Config, bits: int) -> Layout:
    def packed(codes: Tensor) -> Tensor:
        from humming.transform import transform_humming_weight

        with torch.cuda.device(codes.device):
            words: Tensor = transform_humming_weight(
                codes.contiguous().view(torch.int32),
                config.b_dtype,
                config.a_dtype,
                packed=True,
                use_packed_k_layout=config.use_packed_k_layout,
                use_native_dequant=config.use_native_dequant,
                use_raw_weight=config.use_raw_weight,
                use_flat_weight=config.use_flat_weight,
                use_ldmatrix_dequant=config.use_ldmatrix_dequant,
            )
        return words

    if config.use_packed_k_layout:
        columns = 64
    elif config.use_flat_weight:
        columns = 128 // bits
    else:
        columns = 256 // config.a_dtype.num_bits
    return Layout(packed, bits=bits, rows=ROWS, columns=columns, rows_first=False)


def _packed_down(zeros: Tensor, bits: int) -> Tensor:
    """Pack the zeros of 8 outputs (4 bits) or 4 (8 bits) into a word. [N, G] -> [words, G]."""
    groups = zeros.shape[1]
    across = zeros.t().reshape(-1)  # a row of N fills whole words, so rows may stand end to end
    if bits == 4:
        across = pack_nibbles(across.view(torch.int8))
    return across.view(torch.int32).view(groups, -1).t().contiguous()
