"""How compressed-tensors stores a linear layer, in the variants that a scheme here computes.

    pack-quantized     weight_packed int32 [N, K * bits / 32], weight_scale, weight_shape,
                       perhaps weight_zero_point int32 [N * bits / 32, groups], weight_g_idx
    int-quantized      weight int8 [N, K], one code a byte whatever its bits, weight_scale
    float-quantized    weight float8_e4m3fn [N, K], weight_scale

weight_scale is [N, groups], [N, 1] per channel or [1] per tensor. Codes are signed, around 0;
packed ones are shifted by half their range and fill a word from the low end, so that on
little-endian machines the bytes of a row are those of `quant.pack` already. Zero points are packed
likewise, but down the outputs. g_idx, which older packages wrote for GPTQ's act-order, names each
input's group.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.formats.layout import FLOATS, Layout, Spec
from quant.fp8 import FP8
from quant.grid import num_groups
from quant.pack import pack_nibbles, unpack_nibbles
from quant.scheme import Scheme
from quant.w4a8_qqq import W4A8QQQ
from quant.w4a16 import W4A16
from quant.w8a8 import W8A8
from quant.w8a16 import W8A16
from quant.weight_only import WeightOnly

WEIGHT_ONLY: dict[int, type[WeightOnly]] = {4: W4A16, 8: W8A16}
WORD_BITS = 32


@dataclass(frozen=True, kw_only=True)
class PackedLayout(Layout):
    """Codes of 4 or 8 bits packed into words; activations as they come."""

    bits: int
    group_size: int
    symmetric: bool
    per_tensor: bool
    ordered: bool

    @property
    def scheme(self) -> WeightOnly:
        """Weights only."""
        kind = WEIGHT_ONLY[self.bits]
        return kind(group_size=self.group_size, symmetric=self.symmetric, range_search=False)

    def specs(self, n: int, k: int) -> dict[str, Spec]:
        """Words, scales, and what goes with zeros and an order of inputs."""
        groups = num_groups(k, self.group_size)
        words = (torch.int32,)
        specs = {
            "weight_packed": Spec(dtypes=words, shape=(n, _num_words(k, self.bits))),
            "weight_scale": _scale_spec(n, groups, self.per_tensor),
            "weight_shape": Spec(dtypes=(torch.int32, torch.int64), shape=(2,)),
        }
        if not self.symmetric:
            shape = (_num_words(n, self.bits), groups)
            specs["weight_zero_point"] = Spec(dtypes=words, shape=shape)
        if self.ordered:
            specs["weight_g_idx"] = Spec(dtypes=(torch.int32, torch.int64), shape=(k,))
        return specs

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take the words' bytes as they are, but for inputs in another order."""
        words, (n, k) = tensors["weight_packed"], tensors["weight_shape"].tolist()
        if n != len(words) or _num_words(k, self.bits) != words.shape[1]:
            raise ValueError(f"weight_shape must fit {list(words.shape)} words, got [{n}, {k}]")
        stored = {"packed": words.contiguous().view(torch.uint8)[:, : k * self.bits // 8]}
        if self.ordered:
            order = _order(tensors["weight_g_idx"], k // num_groups(k, self.group_size))
            stored = {"packed": self._gathered(stored["packed"], order), "order": order.int()}
        stored["scales"] = _rows_of_scales(tensors["weight_scale"], n)
        if not self.symmetric:
            zeros = tensors["weight_zero_point"].t().contiguous().view(torch.uint8)
            opened = unpack_nibbles(zeros).view(torch.uint8) if self.bits == 4 else zeros
            stored["zeros"] = opened[:, :n].t().contiguous()
        return stored

    def _gathered(self, packed: Tensor, order: Tensor) -> Tensor:
        if self.bits == 8:
            return packed[:, order]
        return pack_nibbles(unpack_nibbles(packed)[:, order])


@dataclass(frozen=True, kw_only=True)
class ByteLayout(Layout):
    """Codes of 8 bits as they are, int8 or e4m3, for activations of the same kind."""

    own: W8A8 | FP8
    per_tensor: bool

    @property
    def scheme(self) -> Scheme:
        """Rounds activations per token."""
        return self.own

    def specs(self, n: int, k: int) -> dict[str, Spec]:
        """A byte for each weight, and scales."""
        dtype = torch.int8 if isinstance(self.own, W8A8) else torch.float8_e4m3fn
        return {
            "weight": Spec(dtypes=(dtype,), shape=(n, k)),
            "weight_scale": _scale_spec(n, 1, self.per_tensor),
        }

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give every channel its scale."""
        weight = tensors["weight"]
        scales = _rows_of_scales(tensors["weight_scale"], len(weight))
        return {"weight": weight, "scales": scales.flatten()}


@dataclass(frozen=True, kw_only=True)
class SpreadLayout(Layout):
    """Signed codes of 4 bits, each in a byte of its own, for activations of 8 bits."""

    per_tensor: bool

    @property
    def scheme(self) -> W4A8QQQ:
        """QQQ's per channel: 16 times the code, a 16th of the scale, both exact."""
        return W4A8QQQ(group_size=-1, range_search=False)

    def specs(self, n: int, k: int) -> dict[str, Spec]:
        """A byte for each weight, and scales."""
        return {
            "weight": Spec(dtypes=(torch.int8,), shape=(n, k)),
            "weight_scale": _scale_spec(n, 1, self.per_tensor),
        }

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pack two codes into a byte."""
        codes = tensors["weight"]
        if bool(((codes < -8) | (codes > 7)).any()):
            raise ValueError(
                f"4-bit codes must be -8 ... 7, got {codes.min().item()} ... {codes.max().item()}"
            )
        scales = _rows_of_scales(tensors["weight_scale"], len(codes))
        return {"packed": pack_nibbles(codes), "s_channel": scales.flatten().float() / 16}


def _num_words(count: int, bits: int) -> int:
    return -(-count * bits // WORD_BITS)


def _scale_spec(n: int, groups: int, per_tensor: bool) -> Spec:
    return Spec(dtypes=FLOATS, shape=(1,) if per_tensor else (n, groups))


def _rows_of_scales(scale: Tensor, n: int) -> Tensor:
    """Give [N, groups], also of one scale for all."""
    return scale.expand(n).unsqueeze(-1).contiguous() if scale.ndim == 1 else scale


def _order(groups: Tensor, size: int) -> Tensor:
    """Give the inputs group by group. groups: [K], each input's group -> int64 [K]."""
    order = groups.argsort(stable=True)
    expected = torch.arange(len(groups), device=groups.device) // size
    if not torch.equal(groups[order].long(), expected):
        raise ValueError(f"weight_g_idx must put {size} inputs into each group, got other numbers")
    return order
