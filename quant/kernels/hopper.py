"""What hopper.cuh and stream_k.cuh need on the host: tensor maps, and room for parts of sums."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

SWIZZLED_BYTES = 128  # of a row of a box, as wgmma reads it
MOST_BLOCKS = 1 << 16  # of output features: as many count their parts
MOST_UNITS = 1 << 23  # chunks of all tiles, so that times 256 pairs they are counted in 32 bits
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
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    half, bfloat = kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16, kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    u32, u64 = driver.cuuint32_t, driver.cuuint64_t
    status, made = driver.cuTensorMapEncodeTiled(
        bfloat if matrix.dtype == torch.bfloat16 else half,
        2,
        matrix.data_ptr(),
        [u64(matrix.shape[1]), u64(matrix.shape[0])],
        [u64(matrix.stride(0) * matrix.element_size())],
        [u32(SWIZZLED_BYTES // matrix.element_size()), u32(rows)],
        [u32(1), u32(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if int(status):
        raise RuntimeError(
            f"no tensor map of {matrix.dtype} {list(matrix.shape)} {matrix.stride()}: {status!r}"
        )
    return made
