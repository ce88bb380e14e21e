"""Few tokens times 4-bit weights, bit-equal however many tokens are read: `x @ dequant(W).T`.

For the widths that draft trees have, n = 1 ... 128. The operands are swapped, so that output
features are the long side of the tensor cores' tile and tokens the narrow one, padded to 16, 32 or
64. A weight's codes come as int16 words of four, one chunk of 256 inputs after the other:

    words [K / 256, N, 64]     nibble i of word c in chunk j is the code of input 256 j + 64 i + c

so that the tile of a block is one run of memory, and opening nibble i of a tile of words gives the
operand of one product with inputs 256 j + 64 i ... + 63, each lane keeping its place. Codes become
floats by setting them into the mantissa of a power of two (Kim et al., arXiv 2211.10017): 1024 + c
in float16, 128 + c in bfloat16, less the middle code, exactly. Written for compute capability 9.0.

    y[t, r] = sum over splits, in order, of the sum over their groups g, in order, of
              s[g, r] * (dot_g(c - 8, x) + (8 - z[g, r]) * sum_g(x))

in float32. Neither the splits of K nor the order within one depend on n or on the device; the last
program to finish a tile adds the splits up. That is what makes a row's bits independent of the
others.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.early import admit, await_earlier, early
from quant.kernels.int4 import MIDDLE, exact_product, require_prepared, require_rows
from quant.pack import pack_nibbles, unpack_nibbles

CHUNK = 256  # inputs per step; their words fill rows of 128 bytes
WORDS = CHUNK // 4
MAX_TOKENS = 128  # two tiles of tokens; wider reads are a prefill's, bound by arithmetic
MIN_PROGRAMS = 396  # K is split until there are three for each of an H200's 132 multiprocessors
MAX_SPLITS = 8
NARROWEST, WIDEST = 16, 64  # tokens of a tile


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A weight as the kernel reads it.

    words: [K / 256, N, 64] int16. scales: [groups, N]. zeros: [groups, N] uint8, or None for 8.
    counters: [2 * N / 64] int32, 0 between calls; calls that overlap in time must not share them.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    counters: Tensor


@dataclass(frozen=True, kw_only=True)
class _Tiling:
    """How a launch cuts its work; `rows` and `tokens` leave every row's arithmetic as it is."""

    rows: int  # output features of a program; 64 for each four warps
    tokens: int  # of a program
    stages: int  # chunks in flight
    splits: int  # of K


def prepare(packed: Tensor, scales: Tensor, zeros: Tensor | None) -> Prepared:
    """Reorder a weight as `quant.weight_only` stores it.

    packed: [N, K / 2] uint8. scales: [N, groups]. zeros: [N, groups] uint8, or None.
    """
    n, k = packed.shape[0], packed.shape[1] * 2
    if packed.dtype != torch.uint8 or n % 64 or k % CHUNK:
        raise ValueError(
            f"packed must be uint8 [N, K / 2] with N a multiple of 64 and K of {CHUNK}, "
            f"got {packed.dtype} with N={n}, K={k}"
        )
    groups = scales.shape[-1]
    if scales.shape != (n, groups) or not groups or k % groups:
        raise ValueError(f"scales must be [{n}, groups] with whole groups, got {_form(scales)}")
    _require_group(k // groups)
    if zeros is not None and (zeros.dtype != torch.uint8 or zeros.shape != scales.shape):
        raise ValueError(f"zeros must be uint8 {list(scales.shape)}, got {_form(zeros)}")
    codes = unpack_nibbles(packed).view(n, k // CHUNK, 4, WORDS).permute(1, 0, 3, 2)
    pairs = pack_nibbles(codes.contiguous())  # [K / 256, N, 64, 2], little-endian
    return Prepared(
        words=pairs.view(torch.int16).squeeze(-1),
        scales=scales.t().contiguous(),
        zeros=None if zeros is None else zeros.t().contiguous(),
        counters=torch.zeros(n // 64 * 2, dtype=torch.int32, device=packed.device),
    )


def restore(weight: Prepared) -> tuple[Tensor, Tensor, Tensor | None]:
    """Undo `prepare`: give packed, scales and zeros as they were, bit for bit."""
    chunks, n, _ = weight.words.shape
    codes = unpack_nibbles(weight.words.unsqueeze(-1).view(torch.uint8)).permute(1, 0, 3, 2)
    packed = pack_nibbles(codes.reshape(n, chunks * CHUNK))
    zeros = None if weight.zeros is None else weight.zeros.t().contiguous()
    return packed, weight.scales.t().contiguous(), zeros


def matmul(x: Tensor, weight: Prepared) -> Tensor:
    """Multiply. x: [n, K] float16 or bfloat16, rows contiguous -> [n, N] of x's dtype."""
    _require(x, weight)
    n, n_out = x.shape[0], weight.words.shape[1]
    tiling = _tiling(n, n_out, x.shape[1])
    y = torch.empty(n, n_out, dtype=x.dtype, device=x.device)
    partial = y
    if tiling.splits > 1:
        partial = torch.empty(tiling.splits, n, n_out, dtype=torch.float32, device=x.device)
    group = x.shape[1] // weight.scales.shape[0]
    sums = x if weight.zeros is None else _sums(x, min(group, CHUNK))
    grid = (n_out // tiling.rows, tiling.splits, triton.cdiv(n, tiling.tokens))
    _product[grid](
        x,
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        sums,
        partial,
        weight.counters,
        y,
        n,
        n_out,
        x.stride(0),
        sums.stride(0),
        weight.words.shape[0],
        splits=tiling.splits,
        group=group,
        lanes=WORDS,
        middle=MIDDLE,
        block_rows=tiling.rows,
        block_tokens=tiling.tokens,
        stages=tiling.stages,
        has_zeros=weight.zeros is not None,
        use_ptx=x.is_cuda,
        num_warps=tiling.rows // 16,
        **early(x.device),
    )
    return y


def reference(x: Tensor, weight: Prepared) -> Tensor:
    """Give the exact product, from the prepared tensors. x: [n, K] -> [n, N] float64."""
    return exact_product(x, *restore(weight))


def _require(x: Tensor, weight: Prepared) -> None:
    require_rows(x, weight.words.shape[0] * CHUNK, most=MAX_TOKENS)
    require_prepared(x, (weight.words, weight.scales, weight.zeros, weight.counters))
    if weight.words.dtype != torch.int16 or weight.counters.dtype != torch.int32:
        raise ValueError(
            f"words and counters must be int16 and int32 as prepared, "
            f"got {weight.words.dtype} and {weight.counters.dtype}"
        )


def _require_group(group: int) -> None:
    if group not in (64, 128) and group % CHUNK:
        raise ValueError(f"group_size must be 64, 128 or a multiple of {CHUNK}, got {group}")


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _tiling(n: int, n_out: int, k: int) -> _Tiling:
    """Choose by measurement on an H200, Llama-3-70B's shapes; see the table in LOG.md."""
    splits = 1
    while splits < MAX_SPLITS and n_out // 64 * splits < MIN_PROGRAMS and splits * CHUNK < k:
        splits *= 2
    tokens = min(max(NARROWEST, triton.next_power_of_2(n)), WIDEST)
    # At 32 tokens a program of 128 rows reads x half as often; at 64 it would be alone on its
    # multiprocessor.
    rows = 128 if tokens == 32 and n_out % 128 == 0 and n_out // 128 * splits >= 256 else 64
    return _Tiling(rows=rows, tokens=tokens, stages=3, splits=splits)


def _sums(x: Tensor, span: int) -> Tensor:
    """Add up each span of inputs. x: [n, K] -> [K / span, n padded] float32."""
    n, k = x.shape
    padded = triton.cdiv(n, WIDEST) * WIDEST
    sums = torch.empty(k // span, padded, dtype=torch.float32, device=x.device)
    sizes = {"span": span, "block_tokens": NARROWEST}
    _span_sums[(k // span, padded // NARROWEST)](
        x, sums, n, x.stride(0), padded, **sizes, num_warps=4, **early(x.device)
    )
    return sums


@triton.jit(do_not_specialize=["n"])
def _span_sums(
    x, sums, n, stride, padded, span: tl.constexpr, block_tokens: tl.constexpr, EARLY: tl.constexpr
):
    """Add one span of some tokens; those past n give 0."""
    admit(EARLY)
    await_earlier(EARLY)
    tokens = tl.program_id(1) * block_tokens + tl.arange(0, block_tokens)
    columns = tl.program_id(0) * span + tl.arange(0, span)
    live = tokens[:, None] < n
    part = tl.load(x + tokens[:, None] * stride + columns[None, :], mask=live, other=0.0)
    tl.store(sums + tl.program_id(0) * padded + tokens, tl.sum(part.to(tl.float32), 1))


@triton.jit(do_not_specialize=["n", "chunks"])
def _product(
    x,  # [n, K]
    words,  # [chunks, N, 64] int16
    scales,  # [groups, N]
    zeros,  # [groups, N] uint8; unread without has_zeros
    sums,  # [K / span, stride_sums] float32; likewise
    partial,  # [splits, n, N] float32; unread for one split
    counters,  # [token tiles * row tiles] int32
    y,  # [n, N]
    n,
    n_out,
    stride_x,
    stride_sums,
    chunks,  # K / 256
    splits: tl.constexpr,
    group: tl.constexpr,
    lanes: tl.constexpr,
    middle: tl.constexpr,
    block_rows: tl.constexpr,
    block_tokens: tl.constexpr,
    stages: tl.constexpr,
    has_zeros: tl.constexpr,
    use_ptx: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Multiply one tile of rows by one tile of tokens over one split of K."""
    admit(EARLY)
    inputs: tl.constexpr = 4 * lanes  # of a chunk
    span: tl.constexpr = group if group < inputs else inputs  # those under one scale
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    lane = tl.arange(0, lanes)[None, :]
    first = tl.program_id(1) * tl.cdiv(chunks, splits)
    last = tl.minimum(first + tl.cdiv(chunks, splits), chunks) - 1
    word_at = words + rows[:, None] * lanes + lane
    total = tl.zeros((block_rows, block_tokens), tl.float32)
    # Scales are too narrow for the copies that run ahead: read one step early by hand.
    start = tl.minimum(first, last) * inputs  # a last split may be empty
    next_scales = _per_span(scales, rows, n_out, start, group, span, inputs)
    await_earlier(EARLY)
    tokens = tl.program_id(2) * block_tokens + tl.arange(0, block_tokens)
    x_at = x + tokens[:, None] * stride_x + lane
    for chunk in tl.range(first, last + 1, num_stages=stages):
        codes = tl.load(word_at + chunk * n_out * lanes)
        scale = next_scales
        ahead = tl.minimum(chunk + 1, last) * inputs
        next_scales = _per_span(scales, rows, n_out, ahead, group, span, inputs)
        if has_zeros:
            zero = _per_span(zeros, rows, n_out, chunk * inputs, group, span, inputs)
            x_sum = _per_span(sums, tokens, stride_sums, chunk * inputs, span, span, inputs)
        product = tl.zeros((block_rows, block_tokens), tl.float32)
        for i in tl.static_range(4):
            part = tl.load(x_at + chunk * inputs + i * lanes, mask=tokens[:, None] < n, other=0.0)
            product = _multiply(codes, i, part, product, middle, use_ptx)
            if (i + 1) * lanes % span == 0:
                if has_zeros:
                    shift = (middle - zero[i * lanes // span].to(tl.float32))[:, None]
                    product += shift * x_sum[i * lanes // span][None, :]
                total += product * scale[i * lanes // span].to(tl.float32)[:, None]
                product = tl.zeros((block_rows, block_tokens), tl.float32)
    _finish(total, rows, tokens, partial, counters, y, n, n_out, splits)


@triton.jit
def _multiply(words, i: tl.constexpr, part, product, middle: tl.constexpr, use_ptx: tl.constexpr):
    weight = _open(words, i, part.dtype, middle, use_ptx)
    if not use_ptx:
        part = part.to(tl.float32)
    return tl.dot(weight, tl.trans(part), product)


@triton.jit
def _per_span(
    values, columns, width, k, group: tl.constexpr, span: tl.constexpr, inputs: tl.constexpr
):
    """Read the spans of the chunk that starts at input k. [groups, width] -> [columns] for each."""
    at = values + k // group * width + columns
    if span == inputs:
        return (tl.load(at),)
    elif span * 2 == inputs:  # noqa: RET505 - or Triton sees two return types
        return tl.load(at), tl.load(at + width)
    else:
        return tl.load(at), tl.load(at + width), tl.load(at + 2 * width), tl.load(at + 3 * width)


@triton.jit
def _finish(total, rows, tokens, partial, counters, y, n, n_out, splits: tl.constexpr):
    """Store the tile, or leave it for the split that comes last, which adds all up in order."""
    offsets = tokens[None, :] * n_out + rows[:, None]
    live = tokens[None, :] < n
    if splits == 1:
        tl.store(y + offsets, total.to(y.dtype.element_ty), mask=live)
    else:
        tl.store(partial + tl.program_id(1) * n * n_out + offsets, total, mask=live)
        tl.debug_barrier()  # every thread's part is stored before one of them says so
        counter = counters + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
            added = tl.zeros(total.shape, tl.float32)
            for split in tl.static_range(splits):
                # From L2: another multiprocessor wrote it.
                at = partial + split * n * n_out + offsets
                added += tl.load(at, mask=live, other=0.0, cache_modifier=".cg")
            tl.store(y + offsets, added.to(y.dtype.element_ty), mask=live)
            tl.atomic_xchg(counter, 0)  # ready for the next replay of a CUDA graph


@triton.jit
def _open(words, i: tl.constexpr, dtype: tl.constexpr, middle: tl.constexpr, use_ptx: tl.constexpr):
    """Turn nibble i of each word into its code less 8. int16 -> dtype, two lanes at a time.

    Without PTX, float32: Triton's interpreter multiplies the bit patterns of bfloat16.
    """
    if not use_ptx:
        return (((words >> (4 * i)) & 15) - middle).to(tl.float32)
    elif dtype == tl.bfloat16:  # noqa: RET505 - or Triton sees two return types
        return _open_bfloat16(words, i)
    else:
        return _open_float16(words, i)


@triton.jit
def _open_float16(words, i: tl.constexpr):
    # 0x6400 is 1024, 0x6408 1032. An odd nibble stays in place, worth 16: (1024 + 16 c) / 16 - 72.
    if i == 0:
        return _float16_by(
            words,
            """{.reg .b32 t, m; mov.b32 m, 0x64086408;
            lop3.b32 t, $1, 0x000f000f, 0x64006400, 0xea; sub.rn.f16x2 $0, t, m;}""",
        )
    elif i == 1:  # noqa: RET505 - as above
        return _float16_by(
            words,
            """{.reg .b32 t, m, a; mov.b32 m, 0x2c002c00; mov.b32 a, 0xd480d480;
            lop3.b32 t, $1, 0x00f000f0, 0x64006400, 0xea; fma.rn.f16x2 $0, t, m, a;}""",
        )
    elif i == 2:
        return _float16_by(
            words,
            """{.reg .b32 t, m; mov.b32 m, 0x64086408; shr.b32 t, $1, 8;
            lop3.b32 t, t, 0x000f000f, 0x64006400, 0xea; sub.rn.f16x2 $0, t, m;}""",
        )
    else:
        return _float16_by(
            words,
            """{.reg .b32 t, m, a; mov.b32 m, 0x2c002c00; mov.b32 a, 0xd480d480;
            shr.b32 t, $1, 8; lop3.b32 t, t, 0x00f000f0, 0x64006400, 0xea;
            fma.rn.f16x2 $0, t, m, a;}""",
        )


@triton.jit
def _open_bfloat16(words, i: tl.constexpr):
    # 0x4300 is 128, 0x4308 136; seven bits of mantissa leave room for a low nibble only.
    if i == 0:
        return _bfloat16_by(
            words,
            """{.reg .b32 t, m; mov.b32 m, 0x43084308;
            lop3.b32 t, $1, 0x000f000f, 0x43004300, 0xea; sub.rn.bf16x2 $0, t, m;}""",
        )
    elif i == 1:  # noqa: RET505 - as above
        return _bfloat16_by(
            words,
            """{.reg .b32 t, m; mov.b32 m, 0x43084308; shr.b32 t, $1, 4;
            lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; sub.rn.bf16x2 $0, t, m;}""",
        )
    elif i == 2:
        return _bfloat16_by(
            words,
            """{.reg .b32 t, m; mov.b32 m, 0x43084308; shr.b32 t, $1, 8;
            lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; sub.rn.bf16x2 $0, t, m;}""",
        )
    else:
        return _bfloat16_by(
            words,
            """{.reg .b32 t, m; mov.b32 m, 0x43084308; shr.b32 t, $1, 12;
            lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; sub.rn.bf16x2 $0, t, m;}""",
        )


@triton.jit
def _float16_by(words, ptx: tl.constexpr):
    """Map words two at a time, which is what a register holds."""
    return tl.inline_asm_elementwise(ptx, "=r,r", [words], tl.float16, is_pure=True, pack=2)


@triton.jit
def _bfloat16_by(words, ptx: tl.constexpr):
    """Map words two at a time."""
    return tl.inline_asm_elementwise(ptx, "=r,r", [words], tl.bfloat16, is_pure=True, pack=2)
