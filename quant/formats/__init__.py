"""How toolkits store quantised linear layers, and which of our schemes computes with them.

    quantization = read_quantization(config, names)         # of a checkpoint folder
    layout = quantization.layout("model.layers.0.mlp.down_proj")
    stored = layout.read({suffix: tensor, ...})             # tensors that layout.scheme understands
    layout.scheme.layer(stored).dequantize()                # the toolkit's own weight, bit for bit

Bit for bit: our float32 holds the product of a code and a scale exactly, and rounded to the dtype
that the toolkit opens its weights in, it is the toolkit's weight. Tests let the toolkits write.

One file a toolkit's family of layouts. What a toolkit can write and no scheme here can compute is
refused by name; nothing is approximated.

Letters: K in-features, N out-features.
"""

import re
from collections.abc import Mapping, Set
from typing import Any

from quant.formats.awq import read_awq
from quant.formats.compressed import read_compressed
from quant.formats.gptq import read_gptq
from quant.formats.layout import FLOATS, Layout, Quantization, Spec
from quant.formats.native import native_config, read_native
from quant.formats.private import is_converted, read_converted, read_unnamed
from quant.formats.qqq import read_qqq

__all__ = ["FLOATS", "Layout", "Quantization", "Spec", "native_config", "read_quantization"]

READERS = {
    "awq": read_awq,
    "compressed-tensors": read_compressed,
    "gptq": read_gptq,
    "qqq": read_qqq,
    "specquant": read_native,
}


def read_quantization(config: Mapping[str, Any], names: Set[str]) -> Quantization | None:
    """Read how a checkpoint's layers are stored; None where they are dense.

    config: of config.json. names: of every tensor in the folder. ValueError, naming it, on a
    format or a variant of one that no scheme computes.
    """
    values = config.get("quantization_config")
    if values is None:
        return read_unnamed(names)
    if not isinstance(values, Mapping):
        raise ValueError(f"quantization_config must be an object, got {values!r}")
    method = values.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise ValueError(
            f"quantization_config: quant_method must be one of {', '.join(sorted(READERS))}, "
            f"got {method!r}"
        )
    converted = method == "gptq" and is_converted(config, names)
    read = read_converted if converted else READERS[method]
    try:
        return read(values, names)
    except (TypeError, AttributeError, KeyError, re.error) as error:  # of a value's type or form
        raise ValueError(
            f"quantization_config must be as {method} writes it, got what it never does: {error!r}"
        ) from error
