"""Layouts of SpecMQuant's engine (arXiv 2505.22179).

    scheme     rounded by       tensors of a layer                             projections
    W4A16      AutoGPTQ         qweight, scales: Marlin's order                fused
    W4A8QQQ    QQQ              as QQQ writes them (quant.formats.qqq)         fused
    W8A8       DeepCompressor   weight, dequant_scale: rows as they are        not fused

Fused means one `qkv_proj` and one `gate_up_proj` for their parts. The converter copies the
toolkit's config.json, so that the quantization_config is AutoGPTQ's, QQQ's or, of DeepCompressor,
none; only the names of the tensors tell a converted folder. Rotated models differ in values only.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.formats.layout import FLOATS, Layout, Quantization, Spec
from quant.formats.marlin import (
    MARLIN,
    any_fused,
    tiles_spec,
    unpermute_channel,
    unpermute_groups,
    untile,
)
from quant.grid import num_groups
from quant.pack import pack_nibbles
from quant.scheme import Scheme
from quant.w4a16 import W4A16
from quant.w8a8 import W8A8

PLACE = "quantization_config"


@dataclass(frozen=True, kw_only=True)
class MarlinLayout(Layout):
    """Marlin's 4-bit weights around code 8."""

    group_size: int

    @property
    def scheme(self) -> W4A16:
        """Symmetric, of 4 bits."""
        return W4A16(group_size=self.group_size, symmetric=True, range_search=False)

    def specs(self, n: int, k: int) -> dict[str, Spec]:
        """The codes' tiles, and a row of scales for each group."""
        groups = num_groups(k, self.group_size)
        return {"qweight": tiles_spec(n, k), "scales": Spec(dtypes=FLOATS, shape=(groups, n))}

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Undo the order of codes and scales."""
        scales = tensors["scales"]
        # One group that fills the row is ordered as a channel is, whatever its size is called.
        unpermute = unpermute_channel if len(scales) == 1 else unpermute_groups
        return {
            "packed": pack_nibbles(untile(tensors["qweight"], MARLIN)),
            "scales": unpermute(scales),
        }


@dataclass(frozen=True, kw_only=True)
class DequantScaleLayout(Layout):
    """DeepCompressor's 8-bit weights per channel."""

    @property
    def scheme(self) -> W8A8:
        """Any smoothing is folded into the weights and the norms before them."""
        return W8A8(smooth_alpha=None)

    def specs(self, n: int, k: int) -> dict[str, Spec]:
        """The codes as they are, and a scale for each channel."""
        return {
            "weight": Spec(dtypes=(torch.int8,), shape=(n, k)),
            "dequant_scale": Spec(dtypes=(torch.float16,), shape=(n,)),
        }

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the scales."""
        return {"weight": tensors["weight"], "scales": tensors["dequant_scale"]}


@dataclass(frozen=True, kw_only=True)
class PrivateQuantization(Quantization):
    """One layout for all of the decoder; lm_head stays dense."""

    own: Layout
    fused_parts: bool
    rounding: str

    @property
    def label(self) -> str:
        """The scheme and the toolkit that rounded."""
        return f"{self.own.scheme.label}+{self.rounding}"

    @property
    def scheme(self) -> Scheme:
        """Of the decoder."""
        return self.own.scheme

    @property
    def fused(self) -> bool:
        """Whether the engine's converter joined the projections."""
        return self.fused_parts

    def layout(self, module: str) -> Layout | None:
        """All of the decoder."""
        return self.own if module.endswith("_proj") else None


def is_converted(config: Mapping[str, Any], names: Set[str]) -> bool:
    """Tell by the tensors' names whether the engine's converter wrote what AutoGPTQ rounded."""
    # Other families have projections that never were apart.
    return config.get("model_type") == "llama" and any_fused(names)


def read_converted(values: Mapping[str, Any], names: Set[str]) -> Quantization:
    """Read AutoGPTQ's settings, of which the converter kept a copy but dropped zeros and g_idx."""
    _require(values, "bits", 4)
    _require(values, "sym", True, why="Marlin's order keeps no zeros")
    if values.get("desc_act", False) and not values.get("static_groups", False):
        raise ValueError(
            f"{PLACE}: desc_act must be false, or static_groups true, in a folder of fused Marlin "
            "tiles, which keep no g_idx, got desc_act true"
        )
    layout = MarlinLayout(group_size=_group_size(values))
    return PrivateQuantization(own=layout, fused_parts=any_fused(names), rounding="gptq")


def read_unnamed(names: Set[str]) -> Quantization | None:
    """Read a folder without a quantization_config, which DeepCompressor does not write."""
    suffixes = {name.rpartition(".")[2] for name in names}
    if "s1_scales" in suffixes:
        raise ValueError(
            "layers must be stored in a layout that is read here, got QServe's 32 x 32 tiles of "
            "W4A8-QoQ (s1_scales)"
        )
    if "dequant_scale" not in suffixes:
        return None
    layout = DequantScaleLayout()
    return PrivateQuantization(own=layout, fused_parts=any_fused(names), rounding="deepcompressor")


def _require(values: Mapping[str, Any], key: str, wanted: object, *, why: str = "") -> None:
    if values.get(key) != wanted:
        raise ValueError(
            f"{PLACE}: {key} must be {wanted!r}"
            + (f" ({why})" if why else "")
            + f", got {values.get(key)!r}"
        )


def _group_size(values: Mapping[str, Any]) -> int:
    group_size = values.get("group_size")
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise ValueError(f"{PLACE}: group_size must be an integer, got {group_size!r}")
    return group_size
