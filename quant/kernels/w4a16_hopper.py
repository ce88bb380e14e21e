"""Few tokens times 4-bit weights on Hopper: `x @ dequant(W).T`, in one of two forms.

    floats   y[t, r] = sum over parts of K, in order, of the sum over their spans, in order, of
                       s[g, r] * dot(c - z[g, r], x[t])
    digits   the same with s[g, r] * v[b, t] * dot(c - z[g, r], d[t]) where x = v * d in block
                       floating point (quant.block_float), b the span's block

in float32. A span is a chunk of 128 inputs, or 64 where groups g are no longer; c - z is exact; a
dot of floats is one tensor-core sum, one of digits is exact. How K is
parted depends on the shape and the device alone: in either form a row has the same bits however
many tokens n are read with it. Digits are faster up to DIGITS_MOST tokens. The kernel is
w4a16_hopper.cu.

What it reads is cut into blocks of 256 outputs and chunks of 128 inputs; N and K are filled up to
whole pairs of blocks and whole chunks with codes and scales that add nothing:

    words  [N / 256, K / 128, 4, 2, 128, 4] int32   tile, half of the chunk, thread, step
    scales [N / 256, steps, 256 * spans]            as stored; a step holds `spans` groups
    zeros  likewise, uint8

A word holds what one thread multiplies in one 16-input step of wgmma: of rows g and g + 8 and
inputs 2c, 2c + 8, 2c + 1 and 2c + 9, a byte each, row g in its low half (g = lane / 4, c = lane %
4; PTX ISA, register fragments of A). Two words are a 32-input step of digits, which stand in that
order (block_float.ORDER). Where no zeros are stored a nibble is its code less 8, in two's
complement.
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.block_float import BLOCK, BlockFloat
from quant.kernels import hopper
from quant.kernels.hopper import STAGE_ALIGNMENT, WIDEST, digits_map, tensor_map
from quant.kernels.int4 import MIDDLE, exact_product, require_prepared, require_rows
from quant.pack import pack_nibbles, unpack_nibbles

ROWS, CHUNK = 256, BLOCK  # of a block, of a stage
PAIR = 2 * ROWS  # outputs of a cluster of two
CONSUMERS = 256  # threads that multiply
THREADS = CONSUMERS + 128  # and a warpgroup, one thread of which copies
# Registers of a thread by tokens: at the start, and of those that multiply after the others gave up
# theirs. What few tokens leave, other kernels' blocks may have beside this one.
REGISTERS = {8: (112, 144), 16: (120, 160), 64: (168, 232)}
COPIERS_HAVE = 40
# Tokens up to which digits are faster (H200, results/h200/w4a16_digits.txt).
DIGITS_MOST = 32
SCALE_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A weight as the kernel reads it; the layouts are told above.

    shape: N and K as stored. group: inputs under one scale.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, int]
    group: int


@dataclass(frozen=True, kw_only=True)
class Variant(hopper.Variant):
    """What a binary is compiled for. digits: the form, else floats."""

    digits: bool
    scale: int  # of SCALE_TYPES
    zeros: bool
    spans: int

    @property
    def files(self) -> tuple[str, ...]:
        """What a chunk is, the form, and the kernel."""
        form = "w4a16_digits.cuh" if self.digits else "w4a16_floats.cuh"
        return "w4a16_chunk.cuh", form, "w4a16_hopper.cu"

    @property
    def token_bytes(self) -> tuple[int, int]:
        """Of a token's inputs in a chunk, and of their scale."""
        return 2 * CHUNK, 4 if self.digits else 0

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one chunk."""
        scales = ROWS * self.spans * (4 if self.scale == 2 else 2)
        zeros = ROWS * self.spans if self.zeros else 0
        whole = self.tokens * sum(self.token_bytes) + ROWS * CHUNK // 2 + scales + zeros
        return -(-whole // STAGE_ALIGNMENT) * STAGE_ALIGNMENT

    @property
    def columns(self) -> int:
        """Both digits of a token are one each."""
        return 2 * self.tokens if self.digits else self.tokens

    @property
    def whole(self) -> bool:
        """Digits are integers, as codes are."""
        return self.digits

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread at the start, and of one that multiplies."""
        return next(held for most, held in REGISTERS.items() if self.tokens <= most)

    @property
    def settings(self) -> Mapping[str, object]:
        """The format, registers, and a product whose left operand lies in registers."""
        left = ", ".join(f"%{self.held + i}" for i in range(4))
        adds = "adds" if self.digits else "adds, 1, 1, 0"
        return {
            "X_A_TOKEN": self.token_bytes[0],
            "X_SCALE_BYTES": self.token_bytes[1],
            "PART_REGISTER": '"r"' if self.digits else '"f"',
            "SCALE": self.scale,
            "ZEROS": int(self.zeros),
            "SPANS": self.spans,
            "REGISTERS": self.registers[0],
            "CONSUMERS_HAVE": self.registers[1],
            "COPIERS_HAVE": COPIERS_HAVE,
            "WGMMA_LINE": self.wgmma(f"{{{left}}}, %{self.held + 4}, {adds}"),
            "WGMMA_ADDS": f'"%{self.held + 5}"',
        }


def prepare(packed: Tensor, scales: Tensor, zeros: Tensor | None) -> Prepared:
    """Reorder a weight as `quant.weight_only` stores it.

    packed: [N, K / 2] uint8. scales: [N, groups]. zeros: [N, groups] uint8, or None.
    """
    n, k = packed.shape[0], packed.shape[1] * 2
    group = k // scales.shape[1]
    needed, got = unfit(n, k, group)
    if needed:
        raise ValueError(f"a weight must have {needed}, got {got}")
    codes = unpack_nibbles(packed)
    codes = torch.nn.functional.pad(
        codes, (0, -k % CHUNK, 0, -n % PAIR), value=MIDDLE
    )  # with zeros stored, scales of 0 make them nothing
    rows, columns = codes.shape
    if zeros is None:
        codes = codes ^ MIDDLE  # its four bits are the code less 8
    # [block, tile, warp, high, g, chunk, half, step, input high, c, input low]
    parts = codes.view(rows // ROWS, 4, 4, 2, 8, columns // CHUNK, 2, 4, 2, 4, 2)
    # -> [block, chunk, tile, half, warp, g, c, step, input low, input high, high]
    parts = parts.permute(0, 5, 1, 6, 2, 4, 9, 7, 10, 8, 3).contiguous()
    words = pack_nibbles(parts.view(-1, 8)).view(torch.int32)
    shape = (rows // ROWS, columns // CHUNK, 4, 2, CHUNK, 4)
    return Prepared(
        words=words.view(shape),
        scales=_steps(scales, group, k),
        zeros=None if zeros is None else _steps(zeros, group, k),
        shape=(n, k),
        group=group,
    )


def restore(weight: Prepared) -> tuple[Tensor, Tensor, Tensor | None]:
    """Undo `prepare`: give packed, scales and zeros as they were, bit for bit."""
    n, k = weight.shape
    blocks, chunks = weight.words.shape[:2]
    codes = unpack_nibbles(weight.words.view(torch.uint8))
    parts = codes.view(blocks, chunks, 4, 2, 4, 8, 4, 4, 2, 2, 2)
    parts = parts.permute(0, 2, 4, 10, 5, 1, 3, 7, 9, 6, 8)
    codes = parts.reshape(blocks * ROWS, chunks * CHUNK)[:n, :k].contiguous()
    if weight.zeros is None:
        codes = codes ^ MIDDLE
    groups = k // weight.group
    zeros = None if weight.zeros is None else _groups(weight.zeros, n, groups)
    return pack_nibbles(codes), _groups(weight.scales, n, groups), zeros


def unfit(n: int, k: int, group: int) -> tuple[str, str]:
    """Say what a shape must have and what it has; empty: it is taken."""
    needed, got = hopper.misfit(n, k, rows=ROWS, chunk=CHUNK)
    if needed:
        return needed, got
    if group == k or (group == CHUNK // 2 and k % group == 0) or group % CHUNK == 0:
        return "", ""
    return f"group_size {CHUNK // 2}, a multiple of {CHUNK} or -1", str(group)


def reference(x: Tensor, weight: Prepared) -> Tensor:
    """Give the exact product, from the prepared tensors. x: [n, K] -> [n, N] float64."""
    return exact_product(x, *restore(weight))


def reads_digits(n: int, *, exact: bool) -> bool:
    """Tell in which form n tokens are read. exact: all in one, whatever is faster."""
    return exact or n <= DIGITS_MOST


def matmul(x: Tensor, weight: Prepared, *, exact: bool = False) -> Tensor:
    """Multiply in the faster form. x: [n, K] float16 or bfloat16, rows contiguous -> [n, N].

    y is of x's dtype. exact: in digits, so that a row has the same bits at every n.
    """
    _require(x, weight)
    if reads_digits(len(x), exact=exact):
        from quant.kernels.blocks_triton import round_blocks

        return multiply(round_blocks(x), weight, x.dtype)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    for rows, out in hopper.launches(x, y):
        # What is left over 64 is few tokens too; narrower variants are of digits alone.
        variant = _variant(weight, x.dtype, max(len(out), DIGITS_MOST + 1), digits=False)
        _launch(variant, tensor_map(rows, variant.tokens), None, weight, out)
    return y


def multiply(x: BlockFloat, weight: Prepared, dtype: torch.dtype) -> Tensor:
    """Multiply what is in digits. x: n tokens of K inputs -> [n, N] of dtype."""
    _require_digits(x, weight)
    n = x.digits.shape[1]
    y = torch.empty(n, weight.shape[0], dtype=dtype, device=x.digits.device)
    for start in range(0, n, WIDEST):
        part = slice(start, start + WIDEST)
        variant = _variant(weight, dtype, len(y[part]), digits=True)
        rows = digits_map(x.digits[:, part], variant.tokens)
        _launch(variant, rows, x.scales[:, part], weight, y[part])
    return y


def build(weight: Prepared, dtype: torch.dtype, *, exact: bool = False) -> None:
    """Compile what `matmul` may need of a weight, for every number of tokens. dtype: of x."""

    def variant(tokens: int) -> Variant:
        return _variant(weight, dtype, tokens, digits=reads_digits(tokens, exact=exact))

    hopper.compile_widths(variant, weight.words.device)


def _variant(weight: Prepared, dtype: torch.dtype, n: int, *, digits: bool) -> Variant:
    return Variant(
        tokens=hopper.width_of(n),
        bf16=dtype == torch.bfloat16,
        digits=digits,
        scale=SCALE_TYPES[weight.scales.dtype],
        zeros=weight.zeros is not None,
        spans=_spans(weight.group, weight.shape[1]),
    )


def _launch(
    variant: Variant,
    x: Any,  # noqa: ANN401  the driver's map of a tensor
    x_scales: Tensor | None,
    weight: Prepared,
    y: Tensor,
) -> None:
    device = y.device
    blocks, chunks = weight.words.shape[:2]
    tiles = blocks // 2
    pairs = hopper.share_out(tiles, chunks, hopper.multiprocessors(device))
    parts, counters = hopper.workspace(device)
    own_group = max(1, -(-min(weight.group, weight.shape[1]) // CHUNK))
    zeros = weight.scales if weight.zeros is None else weight.zeros
    hopper.function(variant, device).launch(
        2 * pairs,
        THREADS,
        variant.shared_bytes,
        [
            x,
            ctypes.c_void_p(0 if x_scales is None else x_scales.data_ptr()),
            ctypes.c_uint(0 if x_scales is None else x_scales.stride(0)),
            *(ctypes.c_void_p(t.data_ptr()) for t in (weight.words, weight.scales, zeros)),
            *(ctypes.c_void_p(t.data_ptr()) for t in (parts, counters, y)),
            *(ctypes.c_uint(v) for v in (len(y), weight.shape[0], tiles, chunks, own_group)),
        ],
        overlapped=True,
    )


def _spans(group: int, k: int) -> int:
    return 2 if group == CHUNK // 2 and group != k else 1


def _steps(values: Tensor, group: int, k: int) -> Tensor:
    """Cut scales or zeros into blocks and steps. [N, groups] -> [N / 256, steps, 256 * spans]."""
    n, groups = values.shape
    spans = _spans(group, k)
    padded = torch.nn.functional.pad(values, (0, -groups % spans, 0, -n % PAIR))
    blocks = padded.view(-1, ROWS, padded.shape[1] // spans, spans)
    return blocks.permute(0, 2, 3, 1).reshape(len(blocks), -1, spans * ROWS).contiguous()


def _groups(steps: Tensor, n: int, groups: int) -> Tensor:
    """Undo `_steps`."""
    blocks = steps.view(len(steps), -1, ROWS)  # [N / 256, groups, 256]
    return blocks.permute(0, 2, 1).reshape(-1, blocks.shape[1])[:n, :groups].contiguous()


def _require_digits(x: BlockFloat, weight: Prepared) -> None:
    digits, scales = x
    if digits.dtype != torch.int8 or scales.dtype != torch.float32:
        raise ValueError(f"digits must be int8, scales float32, got {digits.dtype}, {scales.dtype}")
    n, chunks = digits.shape[1], weight.words.shape[1]
    if digits.shape != (2, n, chunks * CHUNK) or scales.shape[0] != chunks or not n:
        raise ValueError(
            f"digits must be [2, n, {chunks * CHUNK}] and scales [{chunks}, n], "
            f"got {list(digits.shape)} and {list(scales.shape)}"
        )
    room = hopper.width_of(n)  # is copied, whatever n is
    if not digits.is_contiguous() or scales.stride(1) != 1 or scales.data_ptr() % 16:
        raise ValueError(f"digits and scales must be as made, got strides {scales.stride()}")
    if chunks > 1 and (scales.stride(0) < room or scales.stride(0) % 4):
        raise ValueError(f"scales must have rows of {room} numbers, got {scales.stride(0)}")
    require_prepared(digits, (weight.words, weight.scales, weight.zeros))


def _require(x: Tensor, weight: Prepared) -> None:
    require_rows(x, weight.shape[1])
    require_prepared(x, (weight.words, weight.scales, weight.zeros))
