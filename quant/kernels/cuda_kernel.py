"""Our own CUDA kernels behind the common interface: so far W4A16 (quant.kernels.w4a16_hopper).

A row's bits do not depend on how many rows are read with it, up to as many as the kernel takes; a
prompt's long chunks are opened to x's dtype and multiplied by cuBLAS.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.kernels import cuda_build
from quant.kernels import w4a16_hopper as product
from quant.kernels.exact import Tiles
from quant.kernels.kernel import Kernel, KernelLinear
from quant.scheme import QuantLinear
from quant.weight_only import WeightOnlyLinear

CAPABILITY = (9, 0)  # its instructions are Hopper's
DTYPES = (torch.float16, torch.bfloat16)
MOST_TOKENS = 128  # two launches; wider reads are a prefill's, bound by arithmetic


class CudaKernel(Kernel):
    """Kernels that are compiled by NVRTC at their first use."""

    name = "cuda"

    def missing(self, device: torch.device) -> str:
        """A Hopper GPU, and the package that compiles."""
        if device.type != "cuda":
            return self.told("a CUDA device", device)
        found = torch.cuda.get_device_capability(device)
        if found != CAPABILITY:
            return self.told("a GPU of compute capability 9.0", f"{found[0]}.{found[1]}")
        if absent := cuda_build.missing():
            return self.told(absent, "none")
        return ""

    def unfit(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        """Look at the format, then at the kernel's own limits."""
        if not isinstance(layer, WeightOnlyLinear) or layer.bits != 4:
            return self.told("4-bit weights and activations as they are", type(layer).__name__)
        if dtype not in DTYPES:
            return self.told("dtype=float16 or bfloat16", dtype)
        n, k = layer.out_features, layer.in_features
        needed, got = product.unfit(n, k, k // layer.scales.shape[1])
        return self.told(needed, got) if needed else ""

    def inexact(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        """By the kernel's design."""
        return ""

    def fit(self, layer: QuantLinear, dtype: torch.dtype, *, exact: bool = False) -> QuantLinear:
        """Lay a layer out, and compile for every number of tokens.

        An exact one reads a prompt by this kernel too.
        """
        assert isinstance(layer, WeightOnlyLinear)
        fitted = CudaInt4(layer, dtype)
        return Tiles(fitted, dtype, rows=MOST_TOKENS, padded=False) if exact else fitted


class CudaInt4(KernelLinear):
    """4-bit weights in the kernel's own order."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None

    def __init__(self, layer: WeightOnlyLinear, dtype: torch.dtype) -> None:
        super().__init__(layer, kernel=CudaKernel.name, dtype=dtype)
        prepared = product.prepare(layer.packed, layer.scales, layer.zeros)
        product.build(prepared, dtype)
        self._group = prepared.group
        self.register_buffer("words", prepared.words)
        self.register_buffer("scales", prepared.scales)
        self.register_buffer("zeros", prepared.zeros)
        self.register_buffer("order", layer.order)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply. x: [n, K] -> [n, N]."""
        x = x if self.order is None else x.index_select(-1, self.order)
        if len(x) > MOST_TOKENS:
            return F.linear(x, self._opened(None).opened(self.dtype))
        return product.matmul(x, self._prepared())

    def reference(self) -> QuantLinear:
        """Unpack."""
        return self._opened(self.order)

    def _opened(self, order: Tensor | None) -> WeightOnlyLinear:
        packed, scales, zeros = product.restore(self._prepared())
        return WeightOnlyLinear(packed, scales, zeros, order, bits=4)

    def _prepared(self) -> product.Prepared:
        return product.Prepared(
            words=self.words,
            scales=self.scales,
            zeros=self.zeros,
            shape=(self.out_features, self.in_features),
            group=self._group,
        )
