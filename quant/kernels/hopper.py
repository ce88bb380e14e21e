"""What hopper.cuh and stream_k.cuh need on the host: tensor maps, and room for parts of sums.

wgmma leaves a thread the rows g and g + 8 of every 16. So that it has both a gate and what that
gates (an up), slabs of SLAB rows alternate: gates, ups, gates ... Letters: I gates, N = 2 I rows.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

SWIZZLED_BYTES = 128  # of a row of a box, as wgmma reads it
MOST_BLOCKS = 1 << 16  # of output features: as many count their parts
MOST_UNITS = 1 << 23  # chunks of all tiles, so that times 256 pairs they are counted in 32 bits
SLAB = 8  # rows
MOST_SUMS = 256 * 64  # of a block's tile: features times tokens


@cache
def multiprocessors(device: torch.device) -> int:
    """Count a device's multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Give where blocks leave parts of sums, two each, and the counters of those that did.

    All products of a device share it, since a stream runs them one after the other, each touches
    it after the one in front has ended, and leaves every counter at 0. Products on two streams at
    once must not.
    """
    parts = torch.empty(multiprocessors(device), 2, MOST_SUMS, device=device)
    return parts, torch.zeros(MOST_BLOCKS, dtype=torch.int32, device=device)


def tensor_map(matrix: Tensor, rows: int) -> Any:  # noqa: ANN401  the driver's own type
    """Describe a matrix for swizzled copies of `rows` x 64; what lies outside comes as 0.

    matrix: [rows, columns] float16 or bfloat16, rows contiguous and aligned to 16 bytes.
    """
    return _tiled(matrix, (rows,))


def slab_map(matrix: Tensor, rows: int) -> Any:  # noqa: ANN401  the driver's own type
    """Describe gates over ups likewise, for copies of `rows` whose slabs alternate.

    matrix: [N, columns], as of `tensor_map`. In shared memory row 16 j + 8 u + r of a copy is row r
    of slab j of its gates (u = 0) or ups (u = 1).
    """
    return _tiled(slabs(matrix), (rows // (2 * SLAB), 2, SLAB))


def slabs(matrix: Tensor) -> Tensor:
    """View gates over ups as slabs in turn. [N, columns] -> [I / 8, 2, 8, columns]."""
    return matrix.view(2, -1, SLAB, matrix.shape[1]).transpose(0, 1)


def alternated(matrix: Tensor) -> Tensor:
    """Put slabs of gates and ups in turn. [N, columns], gates first -> the same shape."""
    return slabs(matrix).reshape(matrix.shape)


def halved(matrix: Tensor) -> Tensor:
    """Undo `alternated`. [N, columns] -> the same shape."""
    return matrix.reshape(-1, 2, SLAB, matrix.shape[1]).transpose(0, 1).reshape(matrix.shape)


def require_gates(n: int) -> None:
    """Check that rows are whole slabs of gates and of ups."""
    if n % (2 * SLAB):
        raise ValueError(f"gates over ups must have N in multiples of {2 * SLAB}, got N={n}")


def _tiled(tensor: Tensor, box: Sequence[int]) -> Any:  # noqa: ANN401  the driver's own type
    """Describe a tensor to TMA. box: of all dimensions but the last, which gives 128 bytes."""
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    half, bfloat = kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16, kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    u32, u64 = driver.cuuint32_t, driver.cuuint64_t
    size = tensor.element_size()
    status, made = driver.cuTensorMapEncodeTiled(  # which counts dimensions from the last
        bfloat if tensor.dtype == torch.bfloat16 else half,
        tensor.dim(),
        tensor.data_ptr(),
        [u64(length) for length in reversed(tensor.shape)],
        [u64(stride * size) for stride in reversed(tensor.stride()[:-1])],
        [u32(SWIZZLED_BYTES // size), *(u32(length) for length in reversed(box))],
        [u32(1)] * tensor.dim(),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if int(status):
        raise RuntimeError(
            f"no tensor map of {tensor.dtype} {list(tensor.shape)} {tensor.stride()}: {status!r}"
        )
    return made
