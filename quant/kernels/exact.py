"""Products whose rows do not depend on how many are read with them, nor on their place among them.

A library chooses its algorithm by the shape, so that a row times a weight is rounded one way alone
and another among sixty. Called with one shape always, it has one algorithm. Whether that treats all
places alike, and gives the same twice, is no promise of any library: it is tried when a layer is
laid out.

Letters: n tokens, K in-features, N out-features.
"""

import torch
from torch import Tensor

from quant.block_float import BlockFloat
from quant.kernels.kernel import KernelLinear
from quant.scheme import QuantLinear

# Trees of 60 nodes need as many; cuBLAS reads them in 1.05 times the time of one row (H200).
ROWS = 64


class Tiles(KernelLinear):
    """A layer that multiplies at most so many rows at once: more are cut into tiles."""

    def __init__(self, layer: QuantLinear, dtype: torch.dtype, *, rows: int, padded: bool) -> None:
        """padded: the layer is never given fewer rows either."""
        super().__init__(layer, kernel=layer.kernel, dtype=dtype)
        self.layer = layer
        self.rows = rows
        self.padded = padded

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply. x: [n, K] -> [n, N]."""
        tiles = [self._tile(x[i : i + self.rows]) for i in range(0, len(x), self.rows)]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles)

    def reads_digits(self, n: int) -> bool:
        """Where they are one tile, and the layer would."""
        return not self.padded and n <= self.rows and self.layer.reads_digits(n)

    def multiply_digits(self, x: BlockFloat) -> Tensor:
        """Multiply one tile. -> [n, N]."""
        if not isinstance(self.layer, KernelLinear):
            return super().multiply_digits(x)
        return self.layer.multiply_digits(x)

    def reference(self) -> QuantLinear:
        """Give the scheme's own layer."""
        return self.layer.reference() if isinstance(self.layer, KernelLinear) else self.layer

    def _tile(self, x: Tensor) -> Tensor:
        n = len(x)
        if self.padded and n < self.rows:
            x = torch.cat([x, x[:1].expand(self.rows - n, -1)])
        # Not by calling it: whoever watches layers would see the same work twice.
        return self.layer.forward(x)[:n]


def fixed(layer: QuantLinear, dtype: torch.dtype) -> Tiles:
    """Let a layer multiply ROWS rows, always. dtype: of activations.

    Raises ValueError where it treats a row according to its place, or twice the same differently.
    """
    device = next(layer.buffers()).device
    generator = torch.Generator(device).manual_seed(0)
    row = torch.randn(1, layer.in_features, generator=generator, device=device).to(dtype)
    x = row.expand(ROWS, -1).contiguous()
    first, again = layer.forward(x), layer.forward(x)
    if not (torch.equal(first, first[:1].expand_as(first)) and torch.equal(first, again)):
        raise ValueError(
            f"exact=true needs a product that treats all rows alike, got another by "
            f"kernel={layer.kernel} for K={layer.in_features}, N={layer.out_features} in {dtype}"
        )
    return Tiles(layer, dtype, rows=ROWS, padded=True)
