"""4-bit weights as quant.kernels.w4a16_hopper lays them out, opened to 16 bits in one pass.

A prompt's long chunks are cuBLAS's. Opening by torch takes some thirty passes over a weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.early import admit, await_earlier, early

ROWS = tl.constexpr(64)  # of a program: a warpgroup's of a block
TILES = tl.constexpr(4)  # of a block
CHUNK = tl.constexpr(128)
WORDS = tl.constexpr(4096)  # of a block's chunk


@triton.jit
def _open(
    words, scales, zeros, out, n, k, chunks, steps, chunks_per_step,
    has_zeros: tl.constexpr, spans: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    admit(EARLY)
    await_earlier(EARLY)
    tile, block = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    chunk = tl.program_id(1)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, CHUNK)[None, :]
    # Where a word lies, and where in it a code: see quant.kernels.w4a16_hopper.
    thread = row // 16 * 32 + row % 8 * 4 + column % 8 // 2
    at = ((tile * 2 + column // 64) * 128 + thread) * 4 + column % 64 // 16
    place = column % 2 * 4 + column % 16 // 8 * 2 + row % 16 // 8
    word = tl.load(words + (block * chunks + chunk).to(tl.int64) * WORDS + at)
    code = (word >> (place * 4)) & 15
    group = (block * steps + chunk // chunks_per_step) * spans
    if spans == 2:
        group += column // 64
    beside = row // 16 * 16 + row % 8 * 2 + row % 16 // 8  # rows g and g + 8 are
    group = group * (ROWS * TILES) + tile * ROWS + beside
    if has_zeros:
        zero = tl.load(zeros + group).to(tl.int32)
    else:
        code ^= 8
        zero = 8
    # Both factors are exact in float32, and so is the product: it is rounded once.
    scale = tl.load(scales + group).to(out.dtype.element_ty).to(tl.float32)
    value = ((code - zero).to(tl.float32) * scale).to(out.dtype.element_ty)
    row += (block * TILES + tile) * ROWS
    column += chunk * CHUNK
    tl.store(out + row.to(tl.int64) * k + column, value, mask=(row < n) & (column < k))


def opened(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    shape: tuple[int, int],
    *,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """Give the weight as `quant.weight_only` opens it, bit for bit. -> [N, K] of dtype.

    words, scales, zeros: as of `quant.kernels.w4a16_hopper.Prepared`. shape: N and K. group: inputs
    under one scale.
    """
    n, k = shape
    blocks, chunks = words.shape[:2]
    spans = scales.shape[2] // (ROWS.value * TILES.value)
    out = torch.empty(n, k, dtype=dtype, device=words.device)
    _open[(blocks * TILES.value, chunks)](
        *(words, scales, scales if zeros is None else zeros, out),
        *(n, k, chunks, scales.shape[1]),
        max(1, -(-min(group, k) // CHUNK.value)),
        has_zeros=zeros is not None,
        spans=spans,
        **early(words.device),
    )
    return out
