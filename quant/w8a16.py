"""W8A16: 8-bit weights, activations as they are; `quant.weight_only` has the arithmetic."""

from dataclasses import dataclass

from quant.weight_only import WeightOnly


@dataclass(frozen=True, kw_only=True)
class W8A16(WeightOnly):
    """Weights of 8 bits, 0 ... 255 around 128 or a stored zero."""

    @property
    def bits(self) -> int:
        """One code in a byte."""
        return 8
