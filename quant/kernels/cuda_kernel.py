"""Our own CUDA kernels behind the common interface, on Hopper.

    w4a16    quant.kernels.w4a16_hopper
    dense    quant.kernels.w16a16_hopper: float16 or bfloat16, the weight cast to x's dtype once

A row's bits do not depend on how many rows are read with it, up to as many as a kernel takes; but
w4a16's are others from where another form is faster on, unless it is to be exact. A prompt's long
chunks are multiplied by cuBLAS, 4-bit ones opened to x's dtype before.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.block_float import BlockFloat
from quant.dense import DenseLinear
from quant.kernels import cuda_build, w16a16_hopper
from quant.kernels import w4a16_hopper as kernel
from quant.kernels.exact import Tiles
from quant.kernels.hopper import WIDEST
from quant.kernels.int4 import DTYPES, Int4Linear, Stored
from quant.kernels.kernel import Kernel, KernelLinear, Rounded
from quant.scheme import QuantLinear
from quant.weight_only import WeightOnlyLinear

CAPABILITY = (9, 0)  # its instructions are Hopper's
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
        if find_spec("triton") is None:  # rounds what w4a16 reads
            return self.told("the package triton", "none")
        return ""

    def unfit(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        """Look at the format, then at the kernel's own limits."""
        n, k = layer.out_features, layer.in_features
        if isinstance(layer, DenseLinear):
            needed, got = w16a16_hopper.unfit(n, k)
        elif isinstance(layer, WeightOnlyLinear) and layer.bits == 4:
            needed, got = kernel.unfit(n, k, k // layer.scales.shape[1])
        else:
            formats = "dense or 4-bit weights, activations as they are"
            return self.told(formats, type(layer).__name__)
        if dtype not in DTYPES:
            return self.told("dtype=float16 or bfloat16", dtype)
        return self.told(needed, got) if needed else ""

    def inexact(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        """By the kernel's design."""
        return ""

    def fit(self, layer: QuantLinear, dtype: torch.dtype, *, exact: bool = False) -> QuantLinear:
        """Lay a layer out, and compile for every number of tokens.

        An exact one reads a prompt by this kernel too.
        """
        fitted: CudaInt4 | CudaDense
        if isinstance(layer, DenseLinear):
            fitted = CudaDense(layer, dtype)
        else:
            assert isinstance(layer, WeightOnlyLinear)
            fitted = CudaInt4(layer, dtype, exact=exact)
        return Tiles(fitted, dtype, rows=fitted.most_tokens, padded=False) if exact else fitted


class CudaInt4(Int4Linear):
    """4-bit weights in the kernel's own order."""

    most_tokens = MOST_TOKENS
    boosts: Tensor

    def __init__(self, layer: WeightOnlyLinear, dtype: torch.dtype, *, exact: bool = False) -> None:
        """exact: a row has the same bits however many are read with it."""
        super().__init__(layer, kernel=CudaKernel.name, dtype=dtype)
        prepared = kernel.prepare(layer.packed, layer.scales, layer.zeros)
        kernel.build(prepared, dtype, exact=exact)
        self._exact = exact
        self._group = prepared.group
        self.hold(prepared.words, prepared.scales, prepared.zeros, layer.order)
        self.register_buffer("boosts", prepared.boosts)

    def product(self, x: Tensor) -> Tensor:
        """Multiply by the kernel. x: [n, K] -> [n, N]."""
        return kernel.matmul(x, self._prepared(), exact=self._exact)

    def reads_digits(self, n: int) -> bool:
        """As many as the kernel reads so, unless their inputs had to be put in order first."""
        taken = self.order is None and n <= self.most_tokens
        return taken and kernel.form_of(n, self.dtype, exact=self._exact) == "digits"

    def multiply_digits(self, x: BlockFloat) -> Tensor:
        """Multiply what is rounded already. -> [n, N]."""
        assert self.order is None, "digits lie in the order of the inputs"
        return kernel.multiply(x, self._prepared(), self.dtype)

    def opened(self) -> Tensor:
        """Give the weight in x's dtype: by one kernel on a GPU, else by torch."""
        if not self.words.is_cuda:
            return super().opened()
        from quant.kernels.open_triton import opened

        shape = (self.out_features, self.in_features)
        own = (self.words, self.scales, self.zeros, shape)
        return opened(*own, group=self._group, dtype=self.dtype)

    def restored(self) -> Stored:
        """Undo the layout, bit for bit."""
        return kernel.restore(self._prepared())

    def _prepared(self) -> kernel.Prepared:
        return kernel.Prepared(
            words=self.words,
            scales=self.scales,
            zeros=self.zeros,
            boosts=self.boosts,
            shape=(self.out_features, self.in_features),
            group=self._group,
        )


class CudaDense(KernelLinear):
    """A weight in x's dtype, where and as torch has it: the very tensor where that is its dtype."""

    most_tokens = WIDEST
    weight: Tensor

    def __init__(self, layer: DenseLinear, dtype: torch.dtype) -> None:
        super().__init__(layer, kernel=CudaKernel.name, dtype=dtype)
        self.register_buffer("weight", layer.weight.to(dtype).contiguous())
        self.rounded = Rounded(layer.weight, self.weight)
        w16a16_hopper.build(self.weight)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply. x: [n, K] -> [n, N]."""
        if len(x) > self.most_tokens:  # cuBLAS reads the weight once for all of them
            return F.linear(x, self.weight)
        return w16a16_hopper.matmul(x, self.weight)

    def reference(self) -> QuantLinear:
        """Give the dense layer."""
        return DenseLinear(self.rounded.restored(self.weight))
