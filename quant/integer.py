"""Products of integers, exact on every device."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# float32 holds every integer up to 2^24, and |int8 * int8| is at most 2^14.
_EXACT_IN_FLOAT32_K = 2**24 // 2**14
# cuBLAS's integer product wants more than 16 rows, and K and N in multiples of 8.
CUDA_MIN_ROWS = 32


def int_matmul(a: Tensor, w: Tensor) -> Tensor:
    """Multiply integers exactly. a: [n, K] int8, w: [N, K] int8 -> [n, N] int32.

    A row of the result depends on its row of `a` alone, however many rows there are.
    """
    (n, k), width = a.shape, w.shape[0]
    if a.device.type == "cpu" and k > 1 and _cpu_is_exact():
        return torch._int_mm(a, w.t())
    if a.device.type == "cuda" and n > 0 and k % 8 == 0 and width % 8 == 0:
        missing = max(0, CUDA_MIN_ROWS - n)
        return torch._int_mm(F.pad(a, (0, 0, 0, missing)), w.t())[:n]
    return _float_matmul(a, w)


def _float_matmul(a: Tensor, w: Tensor) -> Tensor:
    dtype = torch.float32 if a.shape[1] <= _EXACT_IN_FLOAT32_K else torch.float64
    return (a.to(dtype) @ w.to(dtype).t()).to(torch.int32)


@cache
def _cpu_is_exact() -> bool:
    # On processors without VNNI oneDNN adds pairs of products in saturating 16-bit integers and
    # gives wrong sums in silence (seen on torch 2.13 under ONEDNN_MAX_CPU_ISA=AVX2 and
    # AVX512_CORE). Where it is right it is 3 to 10 times as fast as a float32 product. With K = 1
    # it is wrong everywhere.
    generator = torch.Generator().manual_seed(0)
    for rows, k, width in ((1, 64, 32), (1, 256, 64), (5, 256, 64), (33, 256, 64), (64, 768, 64)):
        a = torch.randint(-128, 128, (rows, k), dtype=torch.int8, generator=generator)
        w = torch.randint(-128, 128, (width, k), dtype=torch.int8, generator=generator)
        for left, right in ((a, w), (a.fill_(127), w), (a, w.fill_(-128)), (a, w.fill_(127))):
            if not torch.equal(torch._int_mm(left, right.t()), _float_matmul(left, right)):
                return False
    return True
