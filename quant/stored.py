"""Layers as the checkpoint stores them: quantised by whoever wrote it, or dense."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from quant.dense import Dense
from quant.lattice import Lattice
from quant.scheme import QuantLinear, Scheme


@dataclass(frozen=True, kw_only=True)
class AsStored(Scheme):
    """Take quantised layers as they are, and keep dense ones dense."""

    @property
    def label(self) -> str:
        """Name of what a dense checkpoint is in; a quantised one has a label of its own."""
        return "dense"

    @property
    def as_stored(self) -> bool:
        """Takes what the checkpoint's own format says."""
        return True

    @property
    def by_row(self) -> bool:
        """Gives the weight itself."""
        return False

    def lattice(self, weight: Tensor, absmax: Tensor | None = None) -> Lattice:
        """Refuse: nothing is rounded."""
        return Dense().lattice(weight, absmax)

    def pack(self, weight: Tensor, absmax: Tensor | None = None) -> dict[str, Tensor]:
        """Give a dense weight itself. weight: [N, K]."""
        return Dense().pack(weight, absmax)

    def layer(self, stored: Mapping[str, Tensor]) -> QuantLinear:
        """Make a dense layer."""
        return Dense().layer(stored)
