"""Marlin's order of 4-bit codes and of scales, undone.

A weight lies input by input, [K, N], cut into tiles of 16 inputs by 64 outputs; a tile is 128 words
of 32 bits, one row of tiles after the other: int32 [K / 16, 2N]. A word holds the eight codes that
one thread of a warp hands to a tensor core at once. Word w belongs to thread w / 4 and to the
(w % 4)-th 16 outputs of the tile; slot s of its codes is

    output   16 * (w % 4) + thread / 4 + 8 * (s / 4)
    input    the (s % 4)-th of those the thread holds

and nibble i of the word, from the low end, is slot `slots[i]`: the order in which the kernel's bit
tricks get at them. Marlin (arXiv 2408.11743) multiplies float16, where a thread holds inputs 2t,
2t + 1, 2t + 8 and 2t + 9 with t = thread % 4; QQQ (2406.09904) multiplies int8, where it holds
4t ... 4t + 3.

Letters: K in-features, N out-features.
"""

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.formats.layout import Spec
from quant.pack import unpack_nibbles

TILE_INPUTS, TILE_OUTPUTS = 16, 64
# Scales per channel are permuted in blocks of 32, scales per group in blocks of 64.
CHANNEL_BLOCK, GROUP_BLOCK = 32, 64
FUSED_QUERY = ".self_attn.qkv_proj."


@dataclass(frozen=True, kw_only=True)
class TileOrder:
    """Where a tile's codes are. inputs: those of thread 0; step: from one thread to the next."""

    slots: tuple[int, ...]
    inputs: tuple[int, ...]
    step: int

    def places(self) -> Tensor:
        """For each weight of a tile, input by input, which of its 1024 nibbles holds it."""
        nibbles = torch.arange(TILE_INPUTS * TILE_OUTPUTS)
        word, slot = nibbles // 8, torch.tensor(self.slots)[nibbles % 8]
        thread = word // 4
        outputs = 16 * (word % 4) + thread // 4 + 8 * (slot // 4)
        inputs = torch.tensor(self.inputs)[slot % 4] + self.step * (thread % 4)
        return (inputs * TILE_OUTPUTS + outputs).argsort()


EVENS_FIRST = (0, 2, 4, 6, 1, 3, 5, 7)
MARLIN = TileOrder(slots=EVENS_FIRST, inputs=(0, 1, 8, 9), step=2)
QQQ_GROUPS = TileOrder(slots=EVENS_FIRST, inputs=(0, 1, 2, 3), step=4)
QQQ_CHANNEL = TileOrder(slots=(4, 0, 5, 1, 6, 2, 7, 3), inputs=(0, 1, 2, 3), step=4)


def any_fused(names: Set[str]) -> bool:
    """Tell whether a folder's tensors are named after fused projections."""
    return any(FUSED_QUERY in name for name in names)


def tiles_spec(n: int, k: int) -> Spec:
    """Give the form of the words of an [N, K] weight, or raise ValueError."""
    if n % TILE_OUTPUTS or k % TILE_INPUTS:
        raise ValueError(
            f"Marlin's tiles need N a multiple of {TILE_OUTPUTS} and K of {TILE_INPUTS}, "
            f"got N={n} and K={k}"
        )
    return Spec(dtypes=(torch.int32,), shape=(k // TILE_INPUTS, 2 * n))


def untile(words: Tensor, order: TileOrder) -> Tensor:
    """Give the codes. words: int32 [K / 16, 2N] -> int8 [N, K], 0 ... 15."""
    rows, width = words.shape
    n, k = width // 2, rows * TILE_INPUTS
    codes = unpack_nibbles(words.contiguous().view(torch.uint8))
    tiles = codes.view(rows, n // TILE_OUTPUTS, -1)
    tiles = tiles.index_select(-1, order.places().to(words.device))
    weight = tiles.view(rows, n // TILE_OUTPUTS, TILE_INPUTS, TILE_OUTPUTS)
    return weight.permute(1, 3, 0, 2).reshape(n, k)


def unpermute_channel(scales: Tensor) -> Tensor:
    """Put scales per channel into the order of outputs. [rows, N] -> [N, rows]."""
    # Position 8i + 2c + b holds output 8c + 2i + b.
    blocks = scales.reshape(len(scales), -1, 4, 4, 2)
    return blocks.transpose(-3, -2).reshape(len(scales), -1).t().contiguous()


def unpermute_groups(scales: Tensor) -> Tensor:
    """Put scales per group into the order of outputs. [groups, N] -> [N, groups]."""
    # Position 8i + j holds output 8j + i.
    blocks = scales.reshape(len(scales), -1, 8, 8)
    return blocks.transpose(-2, -1).reshape(len(scales), -1).t().contiguous()
