"""What a scheme is: a number format for weights, and the linear layer that computes with it.

Letters: n tokens, K in-features, N out-features.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from quant.lattice import Lattice

# What `pack` stores is one of these, a foreign checkpoint may bring any: bfloat16 is common.
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# What may compute a layer (quant.kernels). The reference is the scheme's own layer, in torch.
AUTO, REFERENCE = "auto", "reference"
KERNELS = (AUTO, "humming", "triton", "cuda", "torch", "marlin", REFERENCE)


class QuantLinear(nn.Module, ABC):
    """A linear layer whose weight, [N, K], is stored in some scheme's format.

    Every stored tensor is a buffer, so that `weight_bytes` counts what lies in memory and
    `.to(device)` moves all of it. A cast such as `.to(torch.bfloat16)` leaves the buffers' dtypes
    alone, since a format names them, unless the class says that it is `castable`.
    """

    castable: ClassVar[bool] = False

    def __init__(self, *, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight. x: [..., K] -> [..., N], in x's dtype."""

    def reads_digits(self, n: int) -> bool:
        """Tell whether n tokens are better given in block floating point (`quant.block_float`).

        `forward` of a layer that says so takes them as a `BlockFloat` too, and gives [n, N] in the
        layer's dtype: the bits that it gives for what they are rounded from.
        """
        return False

    @abstractmethod
    def dequantize(self) -> Tensor:
        """Give the weight as stored, [N, K] float32; never on a timed path."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.castable:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        for name, buffer in self.named_buffers(recurse=False):
            moved = fn(buffer)
            setattr(self, name, moved if moved.dtype == buffer.dtype else buffer.to(moved.device))
        return self

    @property
    def kernel(self) -> str:
        """What computes the product; a scheme's own layer is the reference."""
        return REFERENCE

    @property
    def weight_bytes(self) -> int:
        """Bytes of every stored tensor of this layer, scales and zeros included."""
        return sum(t.untyped_storage().nbytes() for t in self.buffers())


@dataclass(frozen=True, kw_only=True)
class Scheme(ABC):
    """A number format. Concrete schemes are frozen, keyword-only dataclasses of plain values.

    Stored tensors have one row for each output, [N, ...], but for those named in `per_input`,
    [K], which are the same for all. The kernel is no part of the format: it changes neither what
    is stored nor the label.
    """

    per_input: ClassVar[frozenset[str]] = frozenset({"smooth", "order"})

    kernel: str = AUTO  # what multiplies: one of KERNELS; auto: the fastest that can

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {self.kernel!r}")

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name for tables, such as `w4a16-g128`; equal labels mean equal formats."""

    @property
    def activation_format(self) -> str:
        """What activations are rounded to: int8, fp8, or nothing where they stay as they come."""
        return ""

    @property
    def needs_absmax(self) -> bool:
        """Whether `pack` wants the largest magnitude of each input channel."""
        return False

    @property
    def by_row(self) -> bool:
        """Whether `pack` copies, and rounds each row as if there were no others."""
        return not self.needs_absmax

    @property
    def unsearched(self) -> "Scheme":
        """The same format by plain rounding alone: for weights that mean nothing."""
        return self

    @property
    def as_stored(self) -> bool:
        """Whether layers that a checkpoint holds quantised are taken as they are."""
        return False

    @abstractmethod
    def lattice(self, weight: Tensor, absmax: Tensor | None = None) -> Lattice:
        """Give the values that the format can store around a weight.

        weight: [N, K] floating point. absmax: [K], largest |x| seen per input channel, for
        schemes that move activation outliers into the weight (SmoothQuant).
        Raises ValueError when the shape does not fit the format, or it rounds nothing.
        """

    def pack(self, weight: Tensor, absmax: Tensor | None = None) -> dict[str, Tensor]:
        """Round a weight to the nearest representable one. Arguments and errors as `lattice`."""
        return self.lattice(weight, absmax).nearest()

    @abstractmethod
    def layer(self, stored: Mapping[str, Tensor]) -> QuantLinear:
        """Make the layer from stored tensors, as `pack`, a quantiser or a checkpoint gives them.

        Raises ValueError on missing, superfluous or misshapen tensors.
        """

    def linear(
        self,
        stored: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        exact: bool = False,
    ) -> QuantLinear:
        """Make the layer on a device, computed by the scheme's kernel. dtype: of activations.

        exact: a row of its product does not depend on how many are read with it. Raises ValueError
        as `layer`, and where the named kernel cannot compute this layer.
        """
        from quant.kernels.choice import fit  # kernels know the schemes' layers, not these them

        return fit(self.layer(stored).to(device), self, dtype, exact=exact)


def rows(stored: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Cut some outputs out of stored tensors."""
    return {k: t if k in Scheme.per_input else t[start:stop] for k, t in stored.items()}


def pick(stored: Mapping[str, Tensor], outputs: Tensor) -> dict[str, Tensor]:
    """Copy some outputs of stored tensors, in a given order. outputs: [k] int64."""
    return {k: t if k in Scheme.per_input else t[outputs.to(t.device)] for k, t in stored.items()}


def stack(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
    """Join layers of one scheme and the same inputs, outputs under outputs.

    None where that is impossible: they differ in what is stored, or in how inputs are treated.
    """
    first = parts[0]
    if any(part.keys() != first.keys() for part in parts):
        return None
    joined = {}
    for name in first:
        tensors = [part[name] for part in parts]
        if name not in Scheme.per_input:
            if any(tensor.shape[1:] != tensors[0].shape[1:] for tensor in tensors):
                return None
            joined[name] = torch.cat(tensors)
        elif all(torch.equal(tensors[0], tensor) for tensor in tensors):
            joined[name] = tensors[0]
        else:
            return None
    return joined


def take(stored: Mapping[str, Tensor], required: set[str], optional: set[str]) -> None:
    """Check that `stored` holds exactly the tensors a format names."""
    missing = required - stored.keys()
    extra = stored.keys() - required - optional
    if missing or extra:
        raise ValueError(
            f"stored tensors must be {sorted(required)}"
            + (f" with optional {sorted(optional)}" if optional else "")
            + f", got {sorted(stored)}"
        )


def stored_tensor(
    stored: Mapping[str, Tensor],
    name: str,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    shape: tuple[int, ...],
) -> Tensor:
    """Give one stored tensor, contiguous and alone in its memory, or raise ValueError.

    dtype: several where any of them will do. shape: -1 stands for any positive size. A tensor that
    is a piece of a larger one is copied, or it would keep the larger one alive and `weight_bytes`
    would count it.
    """
    tensor = stored[name]
    fits = len(shape) == tensor.ndim and all(
        size == want or (want == -1 and size > 0)
        for size, want in zip(tensor.shape, shape, strict=True)
    )
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in dtypes or not fits:
        wanted = ", ".join("any" if size == -1 else str(size) for size in shape)
        raise ValueError(
            f"{name} must be {' or '.join(map(str, dtypes))} of shape [{wanted}], "
            f"got {tensor.dtype} of shape {list(tensor.shape)}"
        )
    if tensor.dtype in SCALE_DTYPES and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} must be finite, got infinities or NaNs")
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def is_finite(tensor: Tensor) -> bool:
    """Tell whether nothing is infinite or NaN, without a copy where a model fills the device."""
    # The ends of what holds a NaN are NaN.
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def require_matrix(weight: Tensor) -> tuple[int, int]:
    """Return (N, K) of a finite, not empty, floating-point matrix, or raise ValueError."""
    if weight.ndim != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(
            f"weight must be a floating-point [N, K] matrix with N, K >= 1, got {weight.dtype} "
            f"of shape {list(weight.shape)}"
        )
    if not is_finite(weight):
        raise ValueError("weight must be finite, got infinities or NaNs")
    return weight.shape[0], weight.shape[1]
