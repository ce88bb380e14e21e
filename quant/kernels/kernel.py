"""What a kernel is: something that computes a scheme's layer faster, from a layout of its own.

Every scheme's layer multiplies by itself, in torch, on every device: that is the reference. A
kernel takes such a layer, lays its tensors out anew and multiplies with those; what it rounds
besides is said in its file. It never approximates a weight: `dequantize` unpacks its layout, and
gives the reference's bits.

Letters: n tokens, K in-features, N out-features.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from quant.block_float import BLOCK, BlockFloat
from quant.scheme import QuantLinear


class Kernel(ABC):
    """One way to compute layers. Concrete kernels hold plain settings, if any."""

    name: ClassVar[str]

    @abstractmethod
    def missing(self, device: torch.device) -> str:
        """Say in one line what this machine lacks, and what works instead; empty: nothing."""

    @abstractmethod
    def unfit(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        """Say in one line why a layer is none of this kernel's; empty: it is. dtype: of x."""

    @abstractmethod
    def inexact(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        """Say in one line why a layer of this kernel's cannot be exact; empty: `fit` can make it.

        Exact: a row of the product depends on that row of x alone, bit for bit; neither on how many
        are read with it nor on its place among them.
        """

    @abstractmethod
    def fit(self, layer: QuantLinear, dtype: torch.dtype, *, exact: bool = False) -> QuantLinear:
        """Lay a layer out for this kernel, on the layer's device; only where nothing refuses.

        What may be compiled is compiled here, so that a forward can be captured as a CUDA graph.
        exact: see `inexact`. Raises ValueError where that turns out not to hold.
        """

    def refuses(
        self, layer: QuantLinear, dtype: torch.dtype, device: torch.device, *, exact: bool = False
    ) -> str:
        """Say in one line why not; empty: `fit` works."""
        why = self.missing(device) or self.unfit(layer, dtype)
        return why or (self.inexact(layer, dtype) if exact else "")

    def told(self, needed: str, got: object, instead: str = "reference") -> str:
        """Put a refusal in the house's words."""
        return f"kernel={self.name} needs {needed}, got {got}; kernel={instead} works"


class Absent(Kernel):
    """A kernel that is known by name, and cannot be had here."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name  # type: ignore[misc]
        self.reason = reason

    def missing(self, device: torch.device) -> str:
        """Give the reason."""
        return f"kernel={self.name}: {self.reason}"

    def unfit(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        """Give the reason."""
        return self.missing(torch.device("cpu"))

    def inexact(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        """Give the reason."""
        return self.missing(torch.device("cpu"))

    def fit(self, layer: QuantLinear, dtype: torch.dtype, *, exact: bool = False) -> QuantLinear:
        """Refuse."""
        raise ValueError(self.unfit(layer, dtype))


class KernelLinear(QuantLinear):
    """A layer in a kernel's layout. Stored tensors are buffers, so that `weight_bytes` counts them.

    It stays on the device it was made on.
    """

    def __init__(self, layer: QuantLinear, *, kernel: str, dtype: torch.dtype) -> None:
        """dtype: of activations, the only one that `forward` takes."""
        super().__init__(in_features=layer.in_features, out_features=layer.out_features)
        self.dtype = dtype
        self._kernel = kernel

    @property
    def kernel(self) -> str:
        """What computes the product."""
        return self._kernel

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """Multiply rows. x: [n, K] contiguous, n >= 1 -> [n, N]."""

    def multiply_digits(self, x: BlockFloat) -> Tensor:
        """Multiply n rows of K inputs that are rounded already. -> [n, N]; see `reads_digits`."""
        raise ValueError(f"kernel={self.kernel} reads no digits; x must be {self.dtype}")

    @abstractmethod
    def reference(self) -> QuantLinear:
        """Give the scheme's own layer, its tensors unpacked from the layout; never timed."""

    def forward(self, x: Tensor | BlockFloat) -> Tensor:
        """Multiply. x: [..., K], contiguous, of the layer's dtype -> [..., N]; or digits."""
        if isinstance(x, BlockFloat):
            return self._forward_digits(x)
        if x.dtype != self.dtype or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x must be {self.dtype} of shape [..., {self.in_features}], "
                f"got {x.dtype} of shape {list(x.shape)}"
            )
        if not x.is_contiguous():
            raise ValueError(f"x must be contiguous, got strides {list(x.stride())}")
        rows = x.view(-1, self.in_features) if x.numel() else x.new_empty(0, self.in_features)
        y = self.multiply(rows) if len(rows) else x.new_empty(0, self.out_features)
        return y.view(*x.shape[:-1], self.out_features)

    def dequantize(self) -> Tensor:
        """Give the weight as stored, [N, K] float32, from the kernel's layout."""
        return self.reference().dequantize()

    def _forward_digits(self, x: BlockFloat) -> Tensor:
        digits, scales = x
        n, blocks = digits.shape[1], -(-self.in_features // BLOCK)
        if digits.shape != (2, n, blocks * BLOCK) or len(scales) != blocks or scales.shape[1] < n:
            raise ValueError(
                f"digits must be of shape [2, n, {blocks * BLOCK}], scales of [{blocks}, n or more]"
                f", got {list(digits.shape)} and {list(scales.shape)}"
            )
        if digits.device != (own := next(self.buffers()).device):
            raise ValueError(f"digits must be on the layer's device {own}, got {digits.device}")
        return self.multiply_digits(x)


class Rounded:
    """Scales that a kernel holds in a narrower dtype: what it lost is kept in host memory.

    Only `dequantize` asks for it, so it is no stored tensor: no product reads it.
    """

    def __init__(self, exact: Tensor, held: Tensor) -> None:
        """exact: as stored. held: the same values in the kernel's dtype."""
        self.dtype = exact.dtype
        lossless = torch.equal(held.to(exact.dtype), exact)
        self.exact = None if lossless else exact.cpu()

    def restored(self, held: Tensor) -> Tensor:
        """Give the scales as they were, from what the kernel holds."""
        return held.to(self.dtype) if self.exact is None else self.exact.to(held.device)
