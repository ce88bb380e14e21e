"""Tensors side by side in one buffer, so that one copy moves them all."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

# Bytes: what compilers of kernels want to know of an address, and more than any dtype needs.
ALIGNMENT = 16


@dataclass(frozen=True)
class Parcel:
    """One buffer and what lies in it. whole: [bytes] uint8. parts: views of it, in order."""

    whole: Tensor
    parts: list[Tensor]

    @classmethod
    def like(cls, tensors: Sequence[Tensor], device: torch.device, *, pinned: bool = False) -> Self:
        """Make room for tensors of these shapes and dtypes, each at an aligned address.

        pinned: of host memory, that it may be copied from and to without the host.
        """
        starts = [0, *accumulate(-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in tensors)]
        whole = torch.empty(starts[-1], dtype=torch.uint8, device=device, pin_memory=pinned)
        parts = [
            whole[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(starts, tensors, strict=False)
        ]
        return cls(whole, parts)
