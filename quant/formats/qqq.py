"""QQQ's checkpoints (arXiv 2406.09904), as QQQ itself and GPTQModel write them.

    B          int32 [K / 16, 2N]          codes in the order of QQQ's kernel (quant.formats.marlin)
    s_channel  float32 [1, N]              permuted; QQQ's arithmetic is in quant.w4a8_qqq
    s_group    float16 [groups, N]         permuted; absent, or empty, where rows are whole

QQQ calls the width `wbits`, GPTQModel `bits`. SpecMQuant's converter fuses the projections and
leaves the rest as it is.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quant.formats.layout import Layout, Quantization, Spec
from quant.formats.marlin import (
    QQQ_CHANNEL,
    QQQ_GROUPS,
    any_fused,
    tiles_spec,
    unpermute_channel,
    unpermute_groups,
    untile,
)
from quant.formats.ruled import (
    RuledQuantization,
    one_of,
    read_rules,
    refuse,
    setting,
)
from quant.grid import num_groups
from quant.pack import pack_nibbles
from quant.w4a8_qqq import W4A8QQQ


@dataclass(frozen=True, kw_only=True)
class QQQLayout(Layout):
    """QQQ's 4-bit weights, signed per channel or around code 8 per group."""

    group_size: int

    @property
    def scheme(self) -> W4A8QQQ:
        """QQQ's arithmetic."""
        return W4A8QQQ(group_size=self.group_size, range_search=False)

    def specs(self, n: int, k: int) -> dict[str, Spec]:
        """The codes' tiles, a scale for each channel and perhaps one for each of its groups."""
        groups = num_groups(k, self.group_size)
        if groups == 1 and self.group_size != -1:
            raise ValueError(
                f"group_size of a QQQ layer must be below K, or -1, got {self.group_size} and K={k}"
            )
        specs = {"B": tiles_spec(n, k), "s_channel": Spec(dtypes=(torch.float32,), shape=(1, n))}
        if self.group_size != -1:
            specs["s_group"] = Spec(dtypes=(torch.float16,), shape=(groups, n))
        return specs

    def optional(self, n: int, k: int) -> dict[str, Spec]:
        """An empty tensor for the scales of groups that are not there."""
        empty = {"s_group": Spec(dtypes=(torch.float16,), shape=(0,))}
        return empty if self.group_size == -1 else {}

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Undo the order of codes and scales."""
        order = QQQ_CHANNEL if self.group_size == -1 else QQQ_GROUPS
        stored = {
            "packed": pack_nibbles(untile(tensors["B"], order)),
            "s_channel": unpermute_channel(tensors["s_channel"]).flatten(),
        }
        if self.group_size != -1:
            stored["s_group"] = unpermute_groups(tensors["s_group"])
        return stored


def read_qqq(values: Mapping[str, Any], names: Set[str]) -> Quantization:
    """Read a QQQ folder's quantization_config."""
    one_of(values, "wbits" if "wbits" in values else "bits", (4,), None)
    for key in ("format", "checkpoint_format"):
        one_of(values, key, ("qqq",), "qqq")
    refuse(values, "rotation", "adapter", "activation")
    own = QQQLayout(group_size=setting(values, "group_size", int))
    return RuledQuantization(
        own=own,
        rounding="qqq",
        rules=read_rules(values, partial(_changed, own)),
        lm_head=setting(values, "lm_head", bool, False),
        fused_parts=any_fused(names),
    )


def _changed(layout: QQQLayout, changes: Mapping[str, Any]) -> QQQLayout:
    one_of(changes, "bits", (4,), 4)
    one_of(changes, "sym", (True,), True)
    return replace(layout, group_size=setting(changes, "group_size", int, layout.group_size))
