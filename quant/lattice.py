"""What rounding a weight decides: a grid for each group of inputs, a code for each weight.

A scheme says which values it can store as a `Lattice` around one weight. Rounding to nearest fits
all groups and encodes all weights at once; a calibrated algorithm such as GPTQ (quant.gptq) goes
group by group and column by column, with weights that change on the way. Neither knows the scheme,
and both end in its stored tensors.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.grid import Fit, Grid, decode, encode, fit, num_groups, pieces


@dataclass(frozen=True, kw_only=True)
class Lattice(ABC):
    """The values that a scheme can give one weight, and how it stores those chosen.

    Methods take any number G of groups of any number g of inputs, so a column is [N, 1, 1].
    """

    weight: Tensor  # [N, K] float32 or float64: what is to be rounded
    group_size: int  # inputs of a row that share a grid; -1: all
    smooth: Tensor | None = None  # [K]: the inputs that meet `weight` are x / smooth
    takes_order: bool = False  # whether `order` may stand beside the stored tensors (quant.gptq)

    @property
    def num_groups(self) -> int:
        """Groups of a row. Raises ValueError when they do not fill it."""
        return num_groups(self.weight.shape[1], self.group_size)

    @abstractmethod
    def fit(self, values: Tensor) -> Fit:
        """Choose each group's grid. values: [N, G, g] -> scale and zero [N, G, 1]."""

    @abstractmethod
    def encode(self, values: Tensor, placed: Fit) -> Tensor:
        """Round to the nearest code. values: [N, G, g] -> int8 of the same shape."""

    @abstractmethod
    def decode(self, codes: Tensor, placed: Fit) -> Tensor:
        """Give the values that codes stand for, float32. codes: [N, G, g]."""

    @abstractmethod
    def stored(self, codes: Tensor, placed: Fit) -> dict[str, Tensor]:
        """Give what the scheme stores of a whole weight. codes: [N, num_groups, g]."""

    def nearest(self) -> dict[str, Tensor]:
        """Round the weight as it is."""
        values = pieces(self.weight, self.group_size)
        placed = self.fit(values)
        return self.stored(self.encode(values, placed), placed)


@dataclass(frozen=True, kw_only=True)
class GridLattice(Lattice):
    """The same evenly spaced codes in every group."""

    grid: Grid
    scale_dtype: torch.dtype
    range_search: bool
    store: Callable[[Tensor, Fit], dict[str, Tensor]]  # what `stored` does

    def fit(self, values: Tensor) -> Fit:
        """Lay the grid over each group's range."""
        return fit(values, self.grid, scale_dtype=self.scale_dtype, range_search=self.range_search)

    def encode(self, values: Tensor, placed: Fit) -> Tensor:
        """Round to the nearest code."""
        return encode(values, self.grid, placed)

    def decode(self, codes: Tensor, placed: Fit) -> Tensor:
        """Give (code - zero) * scale."""
        return decode(codes, placed)

    def stored(self, codes: Tensor, placed: Fit) -> dict[str, Tensor]:
        """Give what the scheme stores."""
        return self.store(codes, placed)
