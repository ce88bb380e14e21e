"""What our own kernels for 4-bit weights share: their layer, and what they ask of operands."""

from abc import abstractmethod
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.kernels.kernel import KernelLinear
from quant.pack import unpack_nibbles
from quant.scheme import QuantLinear
from quant.weight_only import WeightOnlyLinear

DTYPES = (torch.float16, torch.bfloat16)  # of activations
MIDDLE = 8  # code that stands for 0 where no zeros are stored

Stored = tuple[Tensor, Tensor, Tensor | None]  # packed, scales and zeros, as quant.weight_only has


class Int4Linear(KernelLinear):
    """4-bit weights in a kernel's own order; reads that are too wide for it are cuBLAS's."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None

    def hold(
        self, words: Tensor, scales: Tensor, zeros: Tensor | None, order: Tensor | None
    ) -> None:
        """Keep the tensors, as the kernel laid them out; order: of the inputs, as stored."""
        self.register_buffer("words", words)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("order", order)

    @property
    @abstractmethod
    def most_tokens(self) -> int:
        """Rows that `product` takes at once."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """Multiply by the kernel. x: [n, K], its inputs in the order of the words -> [n, N]."""

    @abstractmethod
    def restored(self) -> Stored:
        """Undo the layout, bit for bit."""

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply. x: [n, K] -> [n, N]."""
        x = x if self.order is None else x.index_select(-1, self.order)
        if len(x) > self.most_tokens:
            return F.linear(x, self.opened())
        return self.product(x)

    def opened(self) -> Tensor:
        """Give the weight in x's dtype, its columns in the order of the words. [N, K]."""
        return self._opened(None).opened(self.dtype)

    def reference(self) -> QuantLinear:
        """Unpack."""
        return self._opened(self.order)

    def _opened(self, order: Tensor | None) -> WeightOnlyLinear:
        return WeightOnlyLinear(*self.restored(), order, bits=4)


def exact_product(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Multiply in float64. x: [n, K] -> [n, N]."""
    steps = unpack_nibbles(packed).view(*scales.shape, -1).double()
    steps -= MIDDLE if zeros is None else zeros.double().unsqueeze(-1)
    return x.double() @ (steps * scales.double().unsqueeze(-1)).flatten(1).t()


def require_rows(x: Tensor, k: int, *, most: int | None = None) -> None:
    """Check what is multiplied: [n, K] with n up to `most`, rows as the kernels copy them."""
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float16 or bfloat16, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] != k or not len(x) or (most is not None and len(x) > most):
        taken = "1 or more" if most is None else f"1 ... {most}"
        raise ValueError(f"x must be [n, {k}] with n of {taken}, got {list(x.shape)}")
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        raise ValueError(
            f"x must have rows that are contiguous and aligned to 16 bytes, "
            f"got strides {x.stride()} at offset {x.storage_offset()}"
        )


def require_prepared(x: Tensor, tensors: Iterable[Tensor | None]) -> None:
    """Check that a weight's tensors lie where x does, and as they were prepared."""
    for tensor in tensors:
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"weight must be on x's device {x.device}, got {tensor.device}")
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"weight must be contiguous as prepared, got {tensor.stride()}")
