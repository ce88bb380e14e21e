"""What a foreign format is: which layers it quantises, their tensors, and the way to ours."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.scheme import Scheme

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a tensor in a file must be. dtypes: any of them."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]


class Layout(ABC):
    """How one linear layer [N, K] is stored. Concrete layouts are frozen dataclasses of values."""

    @property
    @abstractmethod
    def scheme(self) -> Scheme:
        """What computes with it."""

    @abstractmethod
    def specs(self, n: int, k: int) -> dict[str, Spec]:
        """Tensors that must be there, by suffix, such as `qweight`.

        Raises ValueError where the format cannot hold an [N, K] weight.
        """

    def optional(self, n: int, k: int) -> dict[str, Spec]:
        """Tensors that may be there besides."""
        return {}

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn the tensors of `specs`, and of `optional` those there are, into the scheme's own.

        Raises ValueError where their values mean something that the scheme cannot compute.
        """


class Quantization(ABC):
    """What a checkpoint says of its layers. Concrete ones are frozen dataclasses of values."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name for tables: the scheme and who rounded, such as `w4a16-g128+gptq`."""

    @property
    @abstractmethod
    def scheme(self) -> Scheme:
        """The scheme of the decoder's linear layers, or of most of them."""

    @property
    def fused(self) -> bool:
        """Whether the file has `qkv_proj` and `gate_up_proj` in place of their parts."""
        return False

    @abstractmethod
    def layout(self, module: str) -> Layout | None:
        """How a linear layer is stored; None where it was left dense.

        module: its published name, such as `model.layers.0.self_attn.q_proj` or `lm_head`.
        """
