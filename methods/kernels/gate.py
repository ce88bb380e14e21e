"""SiLU-gate one half of a fused projection by the other. Letters: n tokens, I inner width."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.early import admit, await_earlier, early

BLOCK = tl.constexpr(1024)


@triton.jit
def _silu_mul(gate_up, out, WIDTH: tl.constexpr, EARLY: tl.constexpr):
    """BLOCK columns of one token, rounded between the two steps, as torch rounds."""
    admit(EARLY)
    await_earlier(EARLY)
    dtype = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < WIDTH
    at = gate_up + row * 2 * WIDTH + column
    gate = tl.load(at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=real, other=0.0).to(tl.float32)
    silu = tl.div_rn(gate, 1.0 + tl.exp(-gate)).to(dtype).to(tl.float32)
    tl.store(out + row * WIDTH + column, (silu * up).to(dtype), mask=real)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `methods.fused.silu_mul`."""
    n, both = gate_up.shape
    out = torch.empty(n, both // 2, dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul[(n, triton.cdiv(both // 2, BLOCK.value))](
        gate_up, out, WIDTH=both // 2, enable_fp_fusion=False, **early(out.device)
    )
    return out
