"""Few tokens' int8 codes times int8 weights, scaled as they are stored: W8A8 in one launch.

The operands are swapped, as in `w4a16_triton`: output features are the long side of the tensor
cores' tile, tokens the narrow one. Sums are integers, so that neither how K is split nor who adds
the parts up changes a bit; then, as the reference does,

    y[t, r] = round(round(float(sum_k a[t, k] * w[r, k]) * s[r]) * s_a[t])

Written for compute capability 9.0. Letters: n tokens, K in-features, N out-features.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.early import admit, await_earlier, early

CHUNK = 256  # inputs per step
ROWS = 64  # output features of a program
MAX_TOKENS = 128  # two tiles of tokens; wider reads are a prefill's, bound by arithmetic
# K is split until there are about two for each of an H200's 132 multiprocessors: with four splits
# for two, Llama-3-70B's o, qkv and down took 4 to 22 % longer (1 and 60 tokens, LOG.md).
MIN_PROGRAMS = 256
MAX_SPLITS = 8
NARROWEST, WIDEST = 16, 64  # tokens of a tile


@dataclass(frozen=True, kw_only=True)
class _Tiling:
    """How a launch cuts its work."""

    tokens: int  # of a program
    stages: int  # chunks in flight
    splits: int  # of K


def counters(n_out: int, device: torch.device) -> Tensor:
    """Make what a layer's splits count themselves by: zeros, and zero again after every call.

    Calls that overlap in time must not share them.
    """
    return torch.zeros(n_out // ROWS * (MAX_TOKENS // WIDEST), dtype=torch.int32, device=device)


def matmul(
    codes: Tensor,
    token_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    counted: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply and scale. codes: [n, K] int8, weight: [N, K] int8 -> [n, N] of a float dtype.

    token_scales: [n, 1] float32. scales: [N] of floats. counted: as `counters` makes them.
    """
    _require(codes, token_scales, weight, scales, counted)
    (n, k), n_out = codes.shape, weight.shape[0]
    tiling = _tiling(n, n_out, k)
    y = torch.empty(n, n_out, dtype=dtype, device=codes.device)
    partial = counted
    if tiling.splits > 1:
        partial = torch.empty(tiling.splits, n, n_out, dtype=torch.int32, device=codes.device)
    _product[(n_out // ROWS, tiling.splits, triton.cdiv(n, tiling.tokens))](
        codes,
        token_scales,
        weight,
        scales,
        partial,
        counted,
        y,
        n,
        n_out,
        k,
        splits=tiling.splits,
        chunk=CHUNK,
        block_rows=ROWS,
        block_tokens=tiling.tokens,
        stages=tiling.stages,
        num_warps=4,
        **early(codes.device),
    )
    return y


def _require(
    codes: Tensor, token_scales: Tensor, weight: Tensor, scales: Tensor, counted: Tensor
) -> None:
    n_out, k = weight.shape
    if n_out % ROWS or k % CHUNK:
        raise ValueError(
            f"weight must be [N, K] with N a multiple of {ROWS} and K of {CHUNK}, got {n_out}, {k}"
        )
    if codes.dim() != 2 or codes.shape[1] != k or not 1 <= codes.shape[0] <= MAX_TOKENS:
        raise ValueError(
            f"codes must be [n, {k}] with n of 1 ... {MAX_TOKENS}, got {list(codes.shape)}"
        )
    if codes.dtype != torch.int8 or weight.dtype != torch.int8:
        raise ValueError(f"codes and weight must be int8, got {codes.dtype} and {weight.dtype}")
    if token_scales.dtype != torch.float32 or counted.dtype != torch.int32:
        raise ValueError(
            f"token_scales and counted must be float32 and int32, got {token_scales.dtype} and "
            f"{counted.dtype}"
        )
    for tensor in (codes, token_scales, weight, scales, counted):
        if tensor.device != codes.device or not tensor.is_contiguous():
            raise ValueError(
                f"tensors must be contiguous and on {codes.device}, got strides {tensor.stride()} "
                f"on {tensor.device}"
            )


def _tiling(n: int, n_out: int, k: int) -> _Tiling:
    splits = 1
    while splits < MAX_SPLITS and n_out // ROWS * splits < MIN_PROGRAMS and splits * CHUNK < k:
        splits *= 2
    tokens = min(max(NARROWEST, triton.next_power_of_2(n)), WIDEST)
    return _Tiling(tokens=tokens, stages=3, splits=splits)


@triton.jit(do_not_specialize=["n"])
def _product(
    codes,  # [n, K] int8
    token_scales,  # [n] float32
    weight,  # [N, K] int8
    scales,  # [N]
    partial,  # [splits, n, N] int32; unread for one split
    counted,  # [token tiles * row tiles] int32
    y,  # [n, N]
    n,
    n_out,
    k,
    splits: tl.constexpr,
    chunk: tl.constexpr,
    block_rows: tl.constexpr,
    block_tokens: tl.constexpr,
    stages: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One tile of one split."""
    admit(EARLY)
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    by_row = tl.load(scales + rows).to(tl.float32)
    await_earlier(EARLY)
    tokens = tl.program_id(2) * block_tokens + tl.arange(0, block_tokens)
    column = tl.arange(0, chunk)[None, :]
    chunks = k // chunk
    first = tl.program_id(1) * tl.cdiv(chunks, splits)
    last = tl.minimum(first + tl.cdiv(chunks, splits), chunks)
    weight_at = weight + rows[:, None].to(tl.int64) * k + column
    codes_at = codes + tokens[:, None] * k + column
    live = tokens < n
    total = tl.zeros((block_rows, block_tokens), tl.int32)
    for step in tl.range(first, last, num_stages=stages):
        opened = tl.load(weight_at + step * chunk)
        part = tl.load(codes_at + step * chunk, mask=live[:, None], other=0)
        total = tl.dot(opened, tl.trans(part), total, out_dtype=tl.int32)
    offsets = tokens[None, :] * n_out + rows[:, None]
    if splits == 1:
        _store(total, token_scales, by_row, y, rows, tokens, offsets, live)
    else:
        tl.store(partial + tl.program_id(1) * n * n_out + offsets, total, mask=live[None, :])
        tl.debug_barrier()  # every thread's part is stored before one of them says so
        counter = counted + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
            added = tl.zeros((block_rows, block_tokens), tl.int32)
            for split in tl.static_range(splits):
                # From L2: another multiprocessor wrote it.
                at = partial + split * n * n_out + offsets
                added += tl.load(at, mask=live[None, :], other=0, cache_modifier=".cg")
            _store(added, token_scales, by_row, y, rows, tokens, offsets, live)
            tl.atomic_xchg(counter, 0)  # ready for the next replay of a CUDA graph


@triton.jit
def _store(total, token_scales, by_row, y, rows, tokens, offsets, live):
    """Scale whole sums, by the channel first, and round."""
    by_token = tl.load(token_scales + tokens, mask=live, other=0.0)
    scaled = total.to(tl.float32) * by_row[:, None] * by_token[None, :]
    tl.store(y + offsets, scaled.to(y.dtype.element_ty), mask=live[None, :])
