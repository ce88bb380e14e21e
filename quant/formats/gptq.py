"""GPTQ's checkpoints (arXiv 2210.17323), as AutoGPTQ (archived) and GPTQModel write them.

    qweight   int32 [K / lanes, N]        the code of input lanes * r + i, in lane i of word r
    qzeros    int32 [groups, N / lanes]   the zeros of outputs likewise, each less one in `gptq`
    scales    floating point [groups, N]
    g_idx     int32 [K]                   the group of each input
    w[n, k] = (code[n, k] - zero[g_idx[k], n]) * scales[g_idx[k], n]

A word has lanes = 32 / bits codes, the first in its lowest bits. Checkpoint format `gptq` (v1)
stores zero - 1, `gptq_v2` the zero itself. The writers part ways at a zero of 0: GPTQModel takes
one from the whole word, so that a borrow runs into the next lane and comes back on reading, while
AutoGPTQ lets it spoil the lanes above and reads it as 2^bits, which no scheme stores. So such a
file of AutoGPTQ's is refused.

With desc_act, inputs are sorted by importance before they are grouped, so that a group's are no
neighbours and g_idx tells whose they are; with static groups as well they stay neighbours. What
g_idx says counts, not the two settings.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quant.formats.layout import FLOATS, Layout, Quantization, Spec
from quant.formats.ruled import (
    RuledQuantization,
    names_in,
    one_of,
    quantizers,
    read_rules,
    refuse,
    setting,
)
from quant.grid import num_groups
from quant.pack import pack_nibbles, unpack_nibbles
from quant.scheme import Scheme
from quant.w4a16 import W4A16
from quant.w8a16 import W8A16

SCHEMES: dict[int, type[W4A16 | W8A16]] = {4: W4A16, 8: W8A16}
# A one in the lowest bit of each lane.
ONES = {4: 0x11111111, 8: 0x01010101}
V1, V2 = "gptq", "gptq_v2"


@dataclass(frozen=True, kw_only=True)
class GPTQLayout(Layout):
    """Words of codes along K. less_one: zeros are stored so; borrows: from the whole word."""

    bits: int
    group_size: int
    symmetric: bool
    less_one: bool
    borrows: bool

    @property
    def scheme(self) -> Scheme:
        """Weights of 4 or 8 bits."""
        return SCHEMES[self.bits](
            group_size=self.group_size, symmetric=self.symmetric, range_search=False
        )

    def specs(self, n: int, k: int) -> dict[str, Spec]:
        """Codes, zeros, scales and groups."""
        lanes = 32 // self.bits
        if n % lanes or k % lanes:
            raise ValueError(f"N and K must be multiples of {lanes}, got N={n} and K={k}")
        groups = num_groups(k, self.group_size)
        return {
            "qweight": Spec(dtypes=(torch.int32,), shape=(k // lanes, n)),
            "qzeros": Spec(dtypes=(torch.int32,), shape=(groups, n // lanes)),
            "scales": Spec(dtypes=FLOATS, shape=(groups, n)),
            "g_idx": Spec(dtypes=(torch.int32, torch.int64), shape=(k,)),
        }

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put outputs first, and the inputs of a group side by side."""
        # A word's lanes, as bytes, are in the order of quant.pack already.
        packed = tensors["qweight"].t().contiguous().view(torch.uint8)
        stored = {"scales": tensors["scales"].t().contiguous()}
        zeros = self._zeros(tensors["qzeros"])
        if not self.symmetric:
            stored["zeros"] = zeros
        elif bool((zeros != 2 ** (self.bits - 1)).any()):
            raise ValueError(
                f"qzeros must all mean {2 ** (self.bits - 1)} where sym is true, got other values"
            )
        order = _order(tensors["g_idx"].long(), len(tensors["scales"]))
        if order is None:
            return {"packed": packed, **stored}
        return {"packed": self._ordered(packed, order), "order": order.int(), **stored}

    def _zeros(self, words: Tensor) -> Tensor:
        """Open the zeros. int32 [groups, N / lanes] -> uint8 [N, groups]."""
        top = 2**self.bits - 1
        if self.less_one:
            if not self.borrows and bool((self._lanes(words) == top).any()):
                raise ValueError(
                    f"qzeros must be below {top}, which AutoGPTQ reads as a zero of {top + 1}, "
                    f"got {top}: its packing spoils the zeros beside a zero of 0"
                )
            words = words + ONES[self.bits]
        return self._lanes(words).t().contiguous()

    def _lanes(self, words: Tensor) -> Tensor:
        octets = words.contiguous().view(torch.uint8)
        return octets if self.bits == 8 else unpack_nibbles(octets).view(torch.uint8)

    def _ordered(self, packed: Tensor, order: Tensor) -> Tensor:
        if self.bits == 8:
            return packed.index_select(1, order)
        return pack_nibbles(unpack_nibbles(packed).index_select(1, order))


def read_gptq(values: Mapping[str, Any], names: Set[str]) -> Quantization:
    """Read a GPTQ folder's quantization_config."""
    if values.get("is_marlin_format"):
        raise ValueError("quantization_config: is_marlin_format must be false, got true")
    for key in ("format", "checkpoint_format"):
        one_of(values, key, (V1, V2), V1)
    given = {values[key] for key in ("format", "checkpoint_format") if values.get(key)}
    if len(given) > 1:
        raise ValueError(
            f"quantization_config: format and checkpoint_format must agree, got {sorted(given)}"
        )
    one_of(values, "pack_dtype", ("int32",), "int32")
    refuse(values, "rotation", "adapter", "activation")
    own = GPTQLayout(
        bits=one_of(values, "bits", tuple(SCHEMES), None),
        group_size=setting(values, "group_size", int),
        symmetric=setting(values, "sym", bool, True),
        less_one=V2 not in given,
        borrows="gptqmodel" in quantizers(values),
    )
    # Optimum names the layers of a block that it quantised.
    only = names_in(values, "modules_in_block_to_quantize")
    return RuledQuantization(
        own=own,
        rounding=_rounding(values),
        rules=read_rules(values, partial(_changed, own)),
        lm_head=setting(values, "lm_head", bool, False),
        only=tuple(f".{name}" for name in only) or None,
    )


def _rounding(values: Mapping[str, Any]) -> str:
    """Tell GPTQ from GPTQModel's rounding to nearest, which is stored the same way."""
    meta = values.get("meta")
    return "rtn" if isinstance(meta, Mapping) and "weight_only" in meta else "gptq"


def _changed(layout: GPTQLayout, changes: Mapping[str, Any]) -> GPTQLayout:
    return replace(
        layout,
        bits=one_of(changes, "bits", tuple(SCHEMES), layout.bits),
        group_size=setting(changes, "group_size", int, layout.group_size),
        symmetric=setting(changes, "sym", bool, layout.symmetric),
    )


def _order(g_idx: Tensor, groups: int) -> Tensor | None:
    """Give the inputs, group by group; None where they are so. g_idx: int64 [K]."""
    if bool(((g_idx < 0) | (g_idx >= groups)).any()):
        raise ValueError(
            f"g_idx must be 0 ... {groups - 1}, got {g_idx.min().item()} ... {g_idx.max().item()}"
        )
    sizes = g_idx.bincount(minlength=groups)
    if bool((sizes != sizes[0]).any()):
        raise ValueError(
            f"g_idx must fill its groups equally, got {sizes.min().item()} to "
            f"{sizes.max().item()} inputs in one"
        )
    order = g_idx.argsort(stable=True)
    return None if bool((g_idx.diff() >= 0).all()) else order
