"""What an EAGLE head does to its stream between products: rows side by side, and sums.

Letters: m tokens, D hidden, N rows of a table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.early import admit, await_earlier, early

BLOCK = tl.constexpr(1024)


@triton.jit
def _join(table, tokens, hidden, joined, WIDTH: tl.constexpr, EARLY: tl.constexpr):
    """BLOCK columns of one token's row and of its hidden vector."""
    admit(EARLY)
    await_earlier(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < WIDTH
    first = tl.load(table + tl.load(tokens + row) * WIDTH + column, mask=real)
    second = tl.load(hidden + row * WIDTH + column, mask=real)
    joined += row * 2 * WIDTH + column
    tl.store(joined, first, mask=real)
    tl.store(joined + WIDTH, second, mask=real)


@triton.jit
def _add(x, y, summed, WIDTH: tl.constexpr, SHARED: tl.constexpr, EARLY: tl.constexpr):
    """BLOCK columns of one row. SHARED: all rows of x add the one row of y."""
    admit(EARLY)
    await_earlier(EARLY)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    one = tl.load(x + at, mask=real).to(tl.float32)
    other = tl.load(y + (column if SHARED else at), mask=real).to(tl.float32)
    tl.store(summed + at, (one + other).to(summed.dtype.element_ty), mask=real)


def join(table: Tensor, tokens: Tensor, hidden: Tensor) -> Tensor:
    """See `methods.fused.join`."""
    m, width = hidden.shape
    joined = hidden.new_empty(m, 2 * width)
    grid = (m, triton.cdiv(width, BLOCK.value))
    _join[grid](table, tokens, hidden, joined, WIDTH=width, **early(hidden.device))
    return joined


def add(x: Tensor, y: Tensor) -> Tensor:
    """See `methods.fused.add`."""
    m, width = x.shape
    summed = torch.empty_like(x)
    grid = (m, triton.cdiv(width, BLOCK.value))
    _add[grid](x, y, summed, WIDTH=width, SHARED=y.ndim == 1, **early(x.device))
    return summed
