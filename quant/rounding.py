"""How a weight's codes are chosen: the seam between schemes and calibrated algorithms."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from quant.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What calibration showed of the inputs x that a layer multiplies.

    hessian: [K, K], 2 x mean of x x^T; None where nothing was read. absmax: [K], largest |x|.
    """

    hessian: Tensor | None
    absmax: Tensor | None


class Rounding(ABC):
    """A way to choose codes. Concrete ones are frozen, keyword-only dataclasses of values."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Name in labels of schemes, such as `gptq`."""

    @property
    @abstractmethod
    def needs_hessian(self) -> bool:
        """Whether it looks at the inputs' second moments."""

    @abstractmethod
    def round(self, scheme: Scheme, weight: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """Give the scheme's stored tensors of a weight [N, K]."""


@dataclass(frozen=True, kw_only=True)
class Nearest(Rounding):
    """Each weight by itself, to the nearest value that the scheme has."""

    @property
    def label(self) -> str:
        """Name in labels."""
        return "nearest"

    @property
    def needs_hessian(self) -> bool:
        """Looks at the weight alone."""
        return False

    def round(self, scheme: Scheme, weight: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """Pack it."""
        return scheme.pack(weight, inputs.absmax)
