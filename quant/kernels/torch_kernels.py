"""What torch itself has for a format on a GPU: tinygemm, cuBLAS's integer and e4m3 products.

    dense         cuBLAS, the weight cast to x's dtype once
    w4a16         `_weight_int4pack_mm`: bfloat16, symmetric, groups of 32, 64, 128 or 256
    w8a8          `_int_mm`, its sums exact, scaled in float32
    fp8           `_scaled_mm` with a scale per row and column, bfloat16

tinygemm is fast for a few tokens only: its time grows with them (quant/kernels/choice.py).
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.dense import DenseLinear
from quant.fp8 import FP8Linear
from quant.grid import Tokens
from quant.integer import CUDA_MIN_ROWS
from quant.kernels.exact import ROWS, fixed
from quant.kernels.kernel import Kernel, KernelLinear, Rounded
from quant.kernels.layout import Layout
from quant.scheme import QuantLinear
from quant.w8a8 import W8A8Linear
from quant.weight_only import WeightOnlyLinear

INNER_K_TILES = 8  # tinygemm's own unit of the layout: 8 tiles of 16 inputs
INT4_GROUPS = (32, 64, 128, 256)


class TorchKernel(Kernel):
    """The products that torch ships."""

    name = "torch"

    def missing(self, device: torch.device) -> str:
        """A GPU; its age matters to some formats, and torch says so itself."""
        return "" if device.type == "cuda" else self.told("a CUDA device", device)

    def unfit(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        """Look at the format, then at its product's own limits."""
        if isinstance(layer, DenseLinear):
            return ""
        if isinstance(layer, WeightOnlyLinear):
            return self._unfit_int4(layer, dtype)
        if not isinstance(layer, W8A8Linear | FP8Linear):
            return self.told("a format that torch multiplies", type(layer).__name__)
        if find_spec("triton") is None:
            return self.told("triton, which rounds the activations", "none")
        unit = 8 if isinstance(layer, W8A8Linear) else 16
        if layer.in_features % unit or layer.out_features % unit:
            return self.told(f"K and N in multiples of {unit}", _shape(layer))
        if isinstance(layer, FP8Linear) and dtype != torch.bfloat16:
            return self.told("dtype=bfloat16 for fp8", dtype)
        return ""

    def inexact(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        """Integer sums are; what is summed in floats always multiplies ROWS rows, but tinygemm."""
        if not isinstance(layer, WeightOnlyLinear):
            return ""
        slow = "4-bit ones, which it reads again for every 16 rows"
        return self.told(f"8-bit or dense weights for exact=true, as {ROWS} rows", slow, "triton")

    def fit(self, layer: QuantLinear, dtype: torch.dtype, *, exact: bool = False) -> QuantLinear:
        """Lay a layer out."""
        fitted = self._laid_out(layer, dtype)
        if not exact or isinstance(fitted, TorchInt8):  # whose sums are exact
            return fitted
        return fixed(fitted, dtype)

    def _laid_out(self, layer: QuantLinear, dtype: torch.dtype) -> KernelLinear:
        if isinstance(layer, DenseLinear):
            return TorchDense(layer, dtype)
        if isinstance(layer, WeightOnlyLinear):
            return TorchInt4(layer)
        if isinstance(layer, W8A8Linear):
            return TorchInt8(layer, dtype)
        assert isinstance(layer, FP8Linear)
        return TorchFP8(layer)

    def _unfit_int4(self, layer: WeightOnlyLinear, dtype: torch.dtype) -> str:
        if layer.bits != 4:
            return self.told("4-bit weights", f"{layer.bits} bits")
        if dtype != torch.bfloat16:
            return self.told("dtype=bfloat16 for 4-bit weights", dtype)
        if layer.zeros is not None:
            # It wants zero * scale in bfloat16, which would move every weight of a group.
            return self.told("symmetric weights", "stored zeros")
        group = layer.in_features // layer.scales.shape[1]
        if group not in INT4_GROUPS:
            return self.told(f"group_size {', '.join(map(str, INT4_GROUPS))}", group)
        if layer.in_features % (16 * INNER_K_TILES) or layer.out_features % 8:
            return self.told("K in multiples of 128 and N of 8", _shape(layer))
        return ""


class TorchDense(KernelLinear):
    """Multiply by a weight in x's dtype."""

    weight: Tensor

    def __init__(self, layer: DenseLinear, dtype: torch.dtype) -> None:
        super().__init__(layer, kernel=TorchKernel.name, dtype=dtype)
        self.register_buffer("weight", layer.weight.to(dtype))
        self.rounded = Rounded(layer.weight, self.weight)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply. x: [n, K] -> [n, N]."""
        return F.linear(x, self.weight)

    def reference(self) -> QuantLinear:
        """Give the dense layer."""
        return DenseLinear(self.rounded.restored(self.weight))


class TorchInt4(KernelLinear):
    """tinygemm: codes around 8 in its own order, scale and zero beside each other."""

    packed: Tensor
    scales_zeros: Tensor
    order: Tensor | None

    def __init__(self, layer: WeightOnlyLinear) -> None:
        super().__init__(layer, kernel=TorchKernel.name, dtype=torch.bfloat16)
        held = layer.scales.to(self.dtype)
        self.group_size = layer.in_features // layer.scales.shape[1]
        self.rounded = Rounded(layer.scales, held)
        self.register_buffer("packed", _int4_packed(layer.packed))
        paired = torch.stack([held, torch.zeros_like(held)], -1).transpose(0, 1)
        self.register_buffer("scales_zeros", paired.contiguous())  # [groups, N, 2]
        self.register_buffer("order", layer.order)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply. x: [n, K] -> [n, N]."""
        x = x if self.order is None else x.index_select(-1, self.order)
        return torch._weight_int4pack_mm(x, self.packed, self.group_size, self.scales_zeros)

    def reference(self) -> QuantLinear:
        """Unpack."""
        n, k = self.out_features, self.in_features
        layout = Layout(_int4_packed, bits=4, rows=8, columns=16 * INNER_K_TILES, rows_first=True)
        packed = layout.unpack(self.packed, n, k)
        scales = self.rounded.restored(self.scales_zeros[..., 0].t().contiguous())
        return WeightOnlyLinear(packed, scales, None, self.order, bits=4)


class TorchInt8(KernelLinear):
    """cuBLAS's integer product; the sums are scaled in float32, as the reference scales them."""

    weight: Tensor
    scales: Tensor
    smooth: Tensor | None

    def __init__(self, layer: W8A8Linear, dtype: torch.dtype) -> None:
        super().__init__(layer, kernel=TorchKernel.name, dtype=dtype)
        self.register_buffer("weight", layer.weight)
        self.register_buffer("scales", layer.scales)
        self.register_buffer("smooth", layer.smooth)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply. x: [n, K] -> [n, N]."""
        n = len(x)
        pad = max(0, CUDA_MIN_ROWS - n)
        tokens = _round_rows(x, codes=torch.int8, smooth=self.smooth, pad=pad)
        y = torch._int_mm(tokens.codes, self.weight.t())[:n]
        return (y * self.scales.float()).mul_(tokens.scale).to(x.dtype)

    def reference(self) -> QuantLinear:
        """Give the scheme's layer: the layout is its own."""
        return W8A8Linear(self.weight, self.scales, self.smooth)


class TorchFP8(KernelLinear):
    """cuBLAS's e4m3 product with row-wise scales."""

    weight: Tensor
    scales: Tensor

    def __init__(self, layer: FP8Linear) -> None:
        super().__init__(layer, kernel=TorchKernel.name, dtype=torch.bfloat16)
        held = layer.scales.float()
        self.rounded = Rounded(layer.scales, held)
        self.register_buffer("weight", layer.weight)
        self.register_buffer("scales", held)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply. x: [n, K] -> [n, N]."""
        tokens = _round_rows(x, codes=torch.float8_e4m3fn)
        return torch._scaled_mm(
            tokens.codes,
            self.weight.t(),
            scale_a=tokens.scale,
            scale_b=self.scales.unsqueeze(0),
            out_dtype=self.dtype,
        )

    def reference(self) -> QuantLinear:
        """Give the scheme's layer: the layout is its own."""
        return FP8Linear(self.weight, self.rounded.restored(self.scales))


def _int4_packed(packed: Tensor) -> Tensor:
    # tinygemm's converter reads the even input from the high half of a byte.
    swapped = (packed << 4) | (packed >> 4)
    words: Tensor = torch.ops.aten._convert_weight_to_int4pack(swapped, INNER_K_TILES)
    return words


def _round_rows(
    x: Tensor, *, codes: torch.dtype, smooth: Tensor | None = None, pad: int = 0
) -> Tokens:
    from quant.kernels.tokens_triton import round_rows

    return round_rows(x, codes=codes, smooth=smooth, pad=pad)


def _shape(layer: QuantLinear) -> str:
    return f"K={layer.in_features}, N={layer.out_features}"
