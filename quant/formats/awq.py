"""AWQ's checkpoints (arXiv 2306.00978) in the order `gemm`, of AutoAWQ (archived) and GPTQModel.

    qweight   int32 [K, N / 8]        codes of eight outputs
    qzeros    int32 [groups, N / 8]   their zeros
    scales    floating point [groups, N]
    w[n, k] = (code - zero) * scale

Lane i of a word, four bits from the low end, belongs to output 8c + LANES[i] of word c. Other
orders (gemv, gemv_fast, llm-awq, marlin, ...) are refused.
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
    read_rules,
    refuse,
    setting,
)
from quant.grid import num_groups
from quant.pack import pack_nibbles, unpack_nibbles
from quant.scheme import Scheme
from quant.w4a16 import W4A16

LANES = (0, 2, 4, 6, 1, 3, 5, 7)
ZERO = 8


@dataclass(frozen=True, kw_only=True)
class AWQLayout(Layout):
    """Words of eight outputs' codes."""

    group_size: int
    symmetric: bool

    @property
    def scheme(self) -> Scheme:
        """Weights of 4 bits."""
        return W4A16(group_size=self.group_size, symmetric=self.symmetric, range_search=False)

    def specs(self, n: int, k: int) -> dict[str, Spec]:
        """Codes, zeros and scales."""
        if n % len(LANES):
            raise ValueError(f"N must be a multiple of {len(LANES)}, got N={n}")
        groups = num_groups(k, self.group_size)
        return {
            "qweight": Spec(dtypes=(torch.int32,), shape=(k, n // len(LANES))),
            "qzeros": Spec(dtypes=(torch.int32,), shape=(groups, n // len(LANES))),
            "scales": Spec(dtypes=FLOATS, shape=(groups, n)),
        }

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put outputs first, and in their order."""
        stored = {
            "packed": pack_nibbles(_outputs(tensors["qweight"])),
            "scales": tensors["scales"].t().contiguous(),
        }
        zeros = _outputs(tensors["qzeros"]).contiguous().view(torch.uint8)
        if not self.symmetric:
            stored["zeros"] = zeros
        elif bool((zeros != ZERO).any()):
            raise ValueError(f"qzeros must all be {ZERO} where zero_point is false, got others")
        return stored


def read_awq(values: Mapping[str, Any], names: Set[str]) -> Quantization:
    """Read an AWQ folder's quantization_config."""
    # AutoAWQ says `version`, older ones in capitals; GPTQModel says all three.
    for key in ("version", "format", "checkpoint_format"):
        one_of({key: setting(values, key, str, "gemm").lower()}, key, ("gemm",), None)
    one_of(values, "backend", ("autoawq",), "autoawq")
    one_of(values, "bits", (4,), values.get("w_bit"))
    one_of(values, "pack_dtype", ("int32",), "int32")
    refuse(values, "rotation", "adapter", "activation")
    own = AWQLayout(
        group_size=setting(values, "group_size", int, values.get("q_group_size")),
        symmetric=not _zero_point(values),
    )
    return RuledQuantization(
        own=own,
        rounding="awq",
        rules=read_rules(values, partial(_changed, own)),
        lm_head=setting(values, "lm_head", bool, False),
        dense=names_in(values, "modules_to_not_convert"),
    )


def _zero_point(values: Mapping[str, Any]) -> bool:
    """Tell whether zeros vary: AutoAWQ's word for it, or GPTQModel's."""
    if values.get("zero_point") is None and values.get("sym") is None:
        raise ValueError("quantization_config must hold zero_point or sym, got neither")
    zero_point: bool = setting(values, "zero_point", bool, not setting(values, "sym", bool, False))
    return zero_point


def _changed(layout: AWQLayout, changes: Mapping[str, Any]) -> AWQLayout:
    one_of(changes, "bits", (4,), 4)
    return replace(
        layout,
        group_size=setting(changes, "group_size", int, layout.group_size),
        symmetric=setting(changes, "sym", bool, layout.symmetric),
    )


def _outputs(words: Tensor) -> Tensor:
    """Open words. int32 [rows, N / 8] -> int8 [N, rows]."""
    codes = unpack_nibbles(words.contiguous().view(torch.uint8)).view(*words.shape, len(LANES))
    lanes = torch.tensor(LANES, device=words.device).argsort()
    return codes[..., lanes].view(len(words), -1).t()
