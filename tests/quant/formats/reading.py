"""A layer's file -> the weight that we make of it, the way a checkpoint is read."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from quant.formats import Layout, read_quantization
from tests.quant.formats.cases import MODULE, Case, N


def load_case(folder: Path, case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """Give a layer's tensors, and the package's own weight."""
    if case.package == "autogptq" and find_spec("auto_gptq") is None:
        pytest.skip("auto-gptq is not installed: it has wheels for Python 3.11 at most")
    tensors = load_file(folder / f"{case}.safetensors")
    reference = tensors.pop("reference")
    return tensors, reference


def layout_of(config: dict[str, Any], names: frozenset[str] = frozenset()) -> Layout:
    """Read a quantization_config and give the layout of one layer."""
    quantization = read_quantization({"quantization_config": config}, names)
    assert quantization is not None
    layout = quantization.layout(MODULE)
    assert layout is not None
    return layout


def opened(config: dict[str, Any], tensors: dict[str, Tensor], k: int) -> Tensor:
    """Check a layer's tensors and open them. Gives [N, K] float32."""
    layout = layout_of(config)
    required, optional = layout.specs(N, k), layout.optional(N, k)
    assert required.keys() <= tensors.keys() <= required.keys() | optional.keys()
    for name, tensor in tensors.items():
        spec = (required | optional)[name]
        assert tensor.shape == spec.shape
        assert tensor.dtype in spec.dtypes
    return layout.scheme.layer(layout.read(tensors)).dequantize()
