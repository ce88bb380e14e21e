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
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from quant.kernels import cuda_build
from quant.kernels.hopper import (
    MOST_BLOCKS,
    MOST_UNITS,
    multiprocessors,
    tensor_map,
    workspace,
)
from quant.kernels.int4 import require_rows

ROWS = 128  # outputs of a block
CHUNK = 64  # inputs of a stage
THREADS = 256 + 32  # that multiply, and a warp, one thread of which copies
NARROWEST, WIDEST = 8, 64  # tokens of a launch; more are several launches
SHARED_BYTES = 200 * 1024  # of the 227 KiB a block may have; the rest is for its neighbours
STAGE_ALIGNMENT = 1024
SOURCES = tuple(
    Path(__file__).with_name(n) for n in ("hopper.cuh", "stream_k.cuh", "w16a16_hopper.cu")
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a binary is compiled for."""

    tokens: int
    bf16: bool

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one chunk."""
        return (ROWS + self.tokens) * CHUNK * 2

    @property
    def stages(self) -> int:
        """Chunks in flight."""
        return (SHARED_BYTES - STAGE_ALIGNMENT) // self.stage_bytes

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a launch."""
        return self.stages * self.stage_bytes + STAGE_ALIGNMENT

    @property
    def source(self) -> str:
        """The kernel's text, its settings in front."""
        held, kind = self.tokens // 2, "bf16" if self.bf16 else "f16"
        sums = ", ".join(f"%{i}" for i in range(held))
        line = (
            f"wgmma.mma_async.sync.aligned.m64n{self.tokens}k16.f32.{kind}.{kind} "
            f"{{{sums}}}, %{held}, %{held + 1}, adds, 1, 1, 0, 0;"
        )
        values = {
            "TOKENS": self.tokens,
            "ROWS": ROWS,
            "STAGES": self.stages,
            "BF16": int(self.bf16),
            "WGMMA_LINE": f'"{line}"',
            "WGMMA_SUMS(sum)": ", ".join(f'"+f"(sum[{i}])' for i in range(held)),
        }
        settings = "".join(f"#define {name} {value}\n" for name, value in values.items())
        return settings + "".join(path.read_text(encoding="utf-8") for path in SOURCES)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a shape is cut. tiles, chunks: of two blocks' outputs, of 64 inputs."""

    tiles: int
    chunks: int
    pairs: int


def plan(n: int, k: int, blocks: int) -> Plan:
    """Cut a weight of [N, K]. blocks: that the device runs at once."""
    tiles, chunks = -(-n // (2 * ROWS)), -(-k // CHUNK)
    return Plan(tiles=tiles, chunks=chunks, pairs=min(blocks // 2, tiles * chunks))


def unfit(n: int, k: int) -> tuple[str, str]:
    """Say what a shape must have and what it has; empty: it is taken."""
    if n % 8 or k % 8:
        return "N and K in multiples of 8", f"N={n}, K={k}"
    tiles = -(-n // (2 * ROWS))
    if 2 * tiles > MOST_BLOCKS:
        return f"N of {MOST_BLOCKS * ROWS} at most", str(n)
    if tiles * -(-k // CHUNK) > MOST_UNITS:
        most = MOST_UNITS * 2 * ROWS * CHUNK
        return f"a weight of {most} numbers at most", f"N={n}, K={k}"
    return "", ""


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """Give the exact product. x: [n, K], weight: [N, K] -> [n, N] float64."""
    return x.double() @ weight.double().t()


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply. x: [n, K] float16 or bfloat16, rows contiguous; weight: [N, K] -> [n, N]."""
    _require(x, weight)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    for start in range(0, x.shape[0], WIDEST):
        _launch(x[start : start + WIDEST], weight, y[start : start + WIDEST])
    return y


def build(weight: Tensor) -> None:
    """Compile what `matmul` may need of a weight, for every number of tokens."""
    _require_weight(weight)
    widths = range(NARROWEST, WIDEST + 1, NARROWEST)
    variants = [_variant(weight, tokens) for tokens in widths]
    cuda_build.at_once(partial(_function, variant, weight.device) for variant in variants)


def _plan(weight: Tensor) -> Plan:
    n, k = weight.shape
    return plan(n, k, multiprocessors(weight.device))


def _variant(weight: Tensor, n: int) -> Variant:
    tokens = -(-n // NARROWEST) * NARROWEST
    return Variant(tokens=tokens, bf16=weight.dtype == torch.bfloat16)


def _launch(x: Tensor, weight: Tensor, y: Tensor) -> None:
    cut, variant = _plan(weight), _variant(weight, len(x))
    parts, counters = workspace(x.device)
    _function(variant, x.device).launch(
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


@cache
def _function(variant: Variant, device: torch.device) -> cuda_build.Function:
    shared = variant.shared_bytes
    return cuda_build.function(variant.source, "product", shared_bytes=shared, device=device)


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
