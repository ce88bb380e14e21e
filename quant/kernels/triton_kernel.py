"""Our own Triton kernels behind the common interface.

    w4a16    quant.kernels.w4a16_triton
    w8a8     quant.kernels.w8a8_triton

A row's bits do not depend on how many rows are read with it, up to as many as the kernel takes; a
prompt's long chunks are cuBLAS's, the integers as they are, the others opened to x's dtype unless
they must be exact.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant.kernels.exact import Tiles
from quant.kernels.int4 import DTYPES, Int4Linear, Stored
from quant.kernels.kernel import Kernel, KernelLinear
from quant.kernels.torch_kernels import TorchInt8
from quant.scheme import QuantLinear
from quant.w8a8 import W8A8Linear
from quant.weight_only import WeightOnlyLinear

if TYPE_CHECKING:
    from quant.kernels.w4a16_triton import Prepared

CAPABILITY = (9, 0)  # its instructions are Hopper's
ROWS, COLUMNS = 64, 256  # multiples of N and K
GROUPS = (64, 128)  # or a multiple of COLUMNS


class TritonKernel(Kernel):
    """Kernels that are compiled by Triton at their first use."""

    name = "triton"

    def missing(self, device: torch.device) -> str:
        """A Hopper GPU, and Triton."""
        if device.type != "cuda":
            return self.told("a CUDA device", device)
        if find_spec("triton") is None:
            return self.told("the package triton", "none")
        found = torch.cuda.get_device_capability(device)
        if found != CAPABILITY:
            return self.told("a GPU of compute capability 9.0", f"{found[0]}.{found[1]}")
        return ""

    def unfit(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        """Look at the format, then at the kernel's own limits."""
        is_int4 = isinstance(layer, WeightOnlyLinear) and layer.bits == 4
        if not (is_int4 or isinstance(layer, W8A8Linear)):
            return self.told("4-bit weights, or 8-bit integers all through", type(layer).__name__)
        if dtype not in DTYPES:
            return self.told("dtype=float16 or bfloat16", dtype)
        n, k = layer.out_features, layer.in_features
        if n % ROWS or k % COLUMNS:
            return self.told(f"N in multiples of {ROWS} and K of {COLUMNS}", f"N={n}, K={k}")
        if not isinstance(layer, WeightOnlyLinear):
            return ""
        group = k // layer.scales.shape[1]
        if group not in GROUPS and group % COLUMNS:
            return self.told(f"group_size 64, 128 or a multiple of {COLUMNS}", group)
        return ""

    def inexact(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        """By the kernels' design."""
        return ""

    def fit(self, layer: QuantLinear, dtype: torch.dtype, *, exact: bool = False) -> QuantLinear:
        """Lay a layer out; an exact one reads a prompt by this kernel too."""
        if isinstance(layer, W8A8Linear):
            return TritonInt8(layer, dtype)
        assert isinstance(layer, WeightOnlyLinear)
        fitted = TritonInt4(layer, dtype)
        return Tiles(fitted, dtype, rows=fitted.most_tokens, padded=False) if exact else fitted


class TritonInt4(Int4Linear):
    """4-bit weights in the kernel's own order."""

    counters: Tensor

    def __init__(self, layer: WeightOnlyLinear, dtype: torch.dtype) -> None:
        from quant.kernels import w4a16_triton as kernel

        super().__init__(layer, kernel=TritonKernel.name, dtype=dtype)
        prepared = kernel.prepare(layer.packed, layer.scales, layer.zeros)
        self.hold(prepared.words, prepared.scales, prepared.zeros, layer.order)
        self.register_buffer("counters", prepared.counters)

    @property
    def most_tokens(self) -> int:
        """Two tiles of tokens."""
        from quant.kernels import w4a16_triton as kernel

        return kernel.MAX_TOKENS

    def product(self, x: Tensor) -> Tensor:
        """Multiply by the kernel. x: [n, K] -> [n, N]."""
        from quant.kernels import w4a16_triton as kernel

        return kernel.matmul(x, self._prepared())

    def restored(self) -> Stored:
        """Undo the layout, bit for bit."""
        from quant.kernels import w4a16_triton as kernel

        return kernel.restore(self._prepared())

    def _prepared(self) -> "Prepared":
        from quant.kernels.w4a16_triton import Prepared

        return Prepared(
            words=self.words, scales=self.scales, zeros=self.zeros, counters=self.counters
        )


class TritonInt8(KernelLinear):
    """8-bit weights as they are stored; reads that are too wide are cuBLAS's."""

    counters: Tensor

    def __init__(self, layer: W8A8Linear, dtype: torch.dtype) -> None:
        from quant.kernels import w8a8_triton as kernel

        super().__init__(layer, kernel=TritonKernel.name, dtype=dtype)
        self.wide = TorchInt8(layer, dtype)
        counters = kernel.counters(layer.out_features, layer.weight.device)
        self.register_buffer("counters", counters)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply. x: [n, K] -> [n, N]."""
        from quant.kernels import w8a8_triton as kernel
        from quant.kernels.tokens_triton import round_rows

        own = self.wide
        if len(x) > kernel.MAX_TOKENS:
            return own.multiply(x)
        codes, scale = round_rows(x, codes=torch.int8, smooth=own.smooth)
        return kernel.matmul(codes, scale, own.weight, own.scales, self.counters, x.dtype)

    def reference(self) -> QuantLinear:
        """Give the scheme's layer: the layout is its own."""
        return self.wide.reference()
