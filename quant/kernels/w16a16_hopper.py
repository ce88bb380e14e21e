"""Few tokens times 16-bit weights on Hopper, bit-equal however many are read: `x @ W.T`.

    y[t, r] = sum over parts of K, in order, of one tensor-core sum, in float32

How K is parted depends on the shape and the device alone, never on the number of tokens n. The
kernel is w16a16_hopper.cu. Weights are read where torch has them, [N, K] row by row, in x's dtype;
what a block or a chunk has beyond N and K comes as zeros.

A block takes 128 outputs. With 256 a long layer takes 2 % less at one token, but 8 % more at 60,
where a stage is so large that few are in flight; short layers lose as much or more at both, since
the last block of a tile reads (parts + 1) * outputs * tokens * 4 bytes (H200, LOG.md).
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.kernels import hopper
from quant.kernels.hopper import tensor_map
from quant.kernels.int4 import require_rows

ROWS = 128  # outputs of a block
CHUNK = 64  # inputs of a stage
THREADS = 256 + 32  # that multiply, and a warp, one thread of which copies


@dataclass(frozen=True, kw_only=True)
class Variant(hopper.Variant):
    """What a binary is compiled for."""

    @property
    def files(self) -> tuple[str, ...]:
        """One."""
        return ("w16a16_hopper.cu",)

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one chunk."""
        return (ROWS + self.tokens) * CHUNK * 2

    @property
    def settings(self) -> Mapping[str, object]:
        """Rows, and a product both of whose operands lie in shared memory."""
        both = f"%{self.held}, %{self.held + 1}"
        return {"ROWS": ROWS, "WGMMA_LINE": self.wgmma(f"{both}, adds, 1, 1, 0, 0")}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a shape is cut. tiles, chunks: of two blocks' outputs, of 64 inputs."""

    tiles: int
    chunks: int
    pairs: int


def plan(n: int, k: int, blocks: int) -> Plan:
    """Cut a weight of [N, K]. blocks: that the device runs at once."""
    tiles, chunks = -(-n // (2 * ROWS)), -(-k // CHUNK)
    return Plan(tiles=tiles, chunks=chunks, pairs=hopper.share_out(tiles, chunks, blocks))


def unfit(n: int, k: int) -> tuple[str, str]:
    """Say what a shape must have and what it has; empty: it is taken."""
    return hopper.misfit(n, k, rows=ROWS, chunk=CHUNK)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """Give the exact product. x: [n, K], weight: [N, K] -> [n, N] float64."""
    return x.double() @ weight.double().t()


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply. x: [n, K] float16 or bfloat16, rows contiguous; weight: [N, K] -> [n, N]."""
    _require(x, weight)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    for rows, out in hopper.launches(x, y):
        _launch(rows, weight, out)
    return y


def build(weight: Tensor) -> None:
    """Compile what `matmul` may need of a weight, for every number of tokens."""
    _require_weight(weight)
    hopper.compile_widths(lambda n: _variant(weight, n), weight.device)


def _plan(weight: Tensor) -> Plan:
    n, k = weight.shape
    return plan(n, k, hopper.multiprocessors(weight.device))


def _variant(weight: Tensor, n: int) -> Variant:
    return Variant(tokens=hopper.width_of(n), bf16=weight.dtype == torch.bfloat16)


def _launch(x: Tensor, weight: Tensor, y: Tensor) -> None:
    cut, variant = _plan(weight), _variant(weight, len(x))
    parts, counters = hopper.workspace(x.device)
    hopper.function(variant, x.device).launch(
        2 * cut.pairs,
        THREADS,
        variant.shared_bytes,
        [
            tensor_map(x, variant.tokens),
            tensor_map(weight, ROWS),
            *(ctypes.c_void_p(t.data_ptr()) for t in (parts, counters, y)),
            *(ctypes.c_uint(v) for v in (len(x), weight.shape[0], cut.tiles, cut.chunks)),
        ],
        overlapped=True,
    )


def _require(x: Tensor, weight: Tensor) -> None:
    _require_weight(weight)
    require_rows(x, weight.shape[1])
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"weight must be of x's dtype {x.dtype} on {x.device}, "
            f"got {weight.dtype} on {weight.device}"
        )


def _require_weight(weight: Tensor) -> None:
    if weight.dim() != 2 or not weight.is_contiguous() or weight.data_ptr() % 16:
        raise ValueError(
            f"weight must be [N, K], contiguous and aligned to 16 bytes, got {list(weight.shape)} "
            f"with strides {weight.stride()} at offset {weight.storage_offset()}"
        )
    needed, got = unfit(*weight.shape)
    if needed:
        raise ValueError(f"a weight must have {needed}, got {got}")
