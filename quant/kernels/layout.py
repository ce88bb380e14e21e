"""A kernel's order of codes, undone: learnt from the packer itself, by numbering the codes.

A packer turns codes [N, K] into words in an order that its matrix instruction likes, tile by tile,
and may flip some bits of each. Nobody documents these orders, and they change with a version. So a
tile's codes are numbered, the digits of the numbers packed one after the other, and what comes out
tells where each code went.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from quant.pack import pack_nibbles, unpack_nibbles

TILES = 4  # of a sample, along K: some packers take no fewer


class Layout:
    """Where a packer puts the codes of a tile [rows, columns], and which of their bits it flips."""

    def __init__(
        self,
        pack: Callable[[Tensor], Tensor],
        *,
        bits: int,
        rows: int,
        columns: int,
        rows_first: bool,
    ) -> None:
        """pack: [N, K * bits / 8] uint8 -> words. rows_first: whether tiles go on along K."""
        self.pack = pack
        self.bits = bits
        self.rows = rows
        self.columns = columns
        self.rows_first = rows_first

    def unpack(self, words: Tensor, n: int, k: int) -> Tensor:
        """Give the codes as they were packed, [N, K * bits / 8] uint8."""
        flipped, source = self._learnt(words.device)
        codes = self._codes(words).view(-1, self.rows * self.columns) ^ flipped
        tiles = torch.empty_like(codes)
        tiles[:, source] = codes
        down, along = n // self.rows, k // self.columns
        if self.rows_first:
            grid = tiles.view(down, along, self.rows, self.columns).transpose(1, 2)
        else:
            grid = tiles.view(along, down, self.rows, self.columns).permute(1, 2, 0, 3)
        whole = grid.reshape(n, k)
        return pack_nibbles(whole) if self.bits == 4 else whole.view(torch.uint8)

    def _learnt(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which bits are flipped, and the number of the code at each place of a tile."""
        size, digit = self.rows * self.columns, 2**self.bits
        numbers = torch.zeros(self.rows, TILES * self.columns, dtype=torch.int64, device=device)
        numbers[:, : self.columns] = torch.arange(size, device=device).view(self.rows, -1)
        flipped = self._packed(torch.zeros_like(numbers))[:size]
        source = torch.zeros(size, dtype=torch.int64, device=device)
        weight = 1
        while weight < size:
            seen = self._packed(numbers // weight % digit)[:size] ^ flipped
            source += (seen.long() & (digit - 1)) * weight
            weight *= digit
        if not torch.equal(source.sort().values, torch.arange(size, device=device)):
            raise ValueError(
                f"a packer must keep the codes of a tile of {self.rows} x {self.columns} together"
            )
        return flipped, source

    def _packed(self, codes: Tensor) -> Tensor:
        narrow = codes.to(torch.uint8)
        packed = pack_nibbles(narrow.view(torch.int8)) if self.bits == 4 else narrow
        return self._codes(self.pack(packed))

    def _codes(self, words: Tensor) -> Tensor:
        stored = words.contiguous().view(-1).view(torch.uint8)
        return unpack_nibbles(stored) if self.bits == 4 else stored.view(torch.int8)
