"""W4A16: 4-bit weights, activations as they are; `quant.weight_only` has the arithmetic."""

from dataclasses import dataclass

from quant.weight_only import WeightOnly


@dataclass(frozen=True, kw_only=True)
class W4A16(WeightOnly):
    """Weights of 4 bits, 0 ... 15 around 8 or a stored zero."""

    @property
    def bits(self) -> int:
        """Two codes in a byte."""
        return 4
