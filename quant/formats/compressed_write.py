"""Our stored tensors as compressed-tensors, so that other engines can read what we rounded.

    tensors = write_layer(scheme, stored)      # of each linear layer, by suffix
    config["quantization_config"] = describe(scheme, ignore=["lm_head"])

Nothing is rounded again. A reader that loads a model in some dtype casts the scales to it, so that
config.json's `dtype` should be theirs: float16, of FP8 float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.formats.compressed_layouts import WORD_BITS
from quant.fp8 import FP8
from quant.pack import pack_nibbles
from quant.scheme import Scheme
from quant.w8a8 import W8A8
from quant.weight_only import WeightOnly


def write_layer(scheme: Scheme, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a layer's tensors by suffix. ValueError where the format cannot hold what is stored."""
    if isinstance(scheme, WeightOnly):
        return _write_packed(scheme, stored)
    if isinstance(scheme, W8A8 | FP8):
        if "smooth" in stored:
            raise ValueError("compressed-tensors must be given folded weights, got smooth")
        return {"weight": stored["weight"], "weight_scale": stored["scales"].unsqueeze(-1)}
    raise _unknown(scheme)


def describe(scheme: Scheme, *, ignore: Sequence[str]) -> dict[str, Any]:
    """Give the quantization_config. ignore: linear layers that stay dense, or patterns `re:...`."""
    if isinstance(scheme, WeightOnly):
        kind = "pack-quantized"
        weights = _integers(scheme.bits, symmetric=scheme.symmetric)
        if scheme.group_size != -1:
            weights |= {"strategy": "group", "group_size": scheme.group_size}
        inputs = None
    elif isinstance(scheme, W8A8 | FP8):
        number = "int" if isinstance(scheme, W8A8) else "float"
        kind = f"{number}-quantized"
        weights = _integers(8, symmetric=True) | {"type": number}
        inputs = weights | {"strategy": "token", "dynamic": True}
    else:
        raise _unknown(scheme)
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": kind,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def _unknown(scheme: Scheme) -> ValueError:
    return ValueError(
        f"schemes that compressed-tensors holds are W4A16, W8A16, W8A8 and FP8, got {scheme.label}"
    )


def _integers(bits: int, *, symmetric: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel",
        "dynamic": False,
    }


def _write_packed(scheme: WeightOnly, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "order" in stored:
        raise ValueError("inputs must be in their own order, got order, which no reader takes now")
    packed = stored["packed"]
    n, k = packed.shape[0], packed.shape[1] * 8 // scheme.bits
    tensors = {
        "weight_packed": _words(packed),
        "weight_scale": stored["scales"],
        "weight_shape": torch.tensor([n, k]),
    }
    if not scheme.symmetric:
        zeros = stored["zeros"].t().contiguous()
        if scheme.bits == 4:
            zeros = pack_nibbles(F.pad(zeros, (0, n % 2)).view(torch.int8))
        tensors["weight_zero_point"] = _words(zeros).t().contiguous()
    return tensors


def _words(packed: Tensor) -> Tensor:
    """Fill rows of bytes up to whole words. uint8 [rows, bytes] -> int32 [rows, words]."""
    missing = -packed.shape[1] % (WORD_BITS // 8)
    filled = F.pad(packed, (0, missing)).flatten()  # of one row, strides may be anything
    return filled.view(torch.int32).view(len(packed), -1)
