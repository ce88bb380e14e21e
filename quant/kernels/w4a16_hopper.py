"""Few tokens times 4-bit weights on Hopper, bit-equal however many are read: `x @ dequant(W).T`.

    y[t, r] = sum over parts of K, in order, of the sum over their groups g, in order, of
              s[g, r] * dot_g(c - z[g, r], x)

in float32, where c - z is exact and the dot is one tensor-core sum. How K is parted depends on the
shape and the device alone, never on the number of tokens n. The kernel is w4a16_hopper.cu.

What it reads is cut into blocks of 256 outputs and chunks of 128 inputs; N and K are filled up to
whole pairs of blocks and whole chunks with codes and scales that add nothing:

    words  [N / 256, K / 128, 4, 2, 128, 4] int32   warpgroup, half of the chunk, thread, step
    scales [N / 256, steps, 256 * spans]            as stored; a step holds `spans` groups
    zeros  likewise, uint8

A word holds what one thread multiplies in one 16-input step of wgmma: of rows g and g + 8 and
inputs 2c, 2c + 1, 2c + 8, 2c + 9 (g = lane / 4, c = lane % 4), those of one input in the low half
of the word and of the next in the high half (PTX ISA, wgmma, register fragments of A).
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels import hopper
from quant.kernels.hopper import STAGE_ALIGNMENT, tensor_map
from quant.kernels.int4 import MIDDLE, exact_product, require_prepared, require_rows
from quant.pack import pack_nibbles, unpack_nibbles

ROWS, CHUNK = 256, 128  # of a block, of a stage
PAIR = 2 * ROWS  # outputs of a cluster of two
CONSUMERS = 256  # threads that multiply
THREADS = CONSUMERS + 128  # and a warpgroup, one thread of which copies
# Registers of a thread by tokens: at the start, and of those that multiply after the others gave up
# theirs. What few tokens leave, other kernels' blocks may have beside this one.
REGISTERS = {8: (112, 144), 16: (120, 160), 64: (168, 232)}
COPIERS_HAVE = 40
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
    """What a binary is compiled for."""

    scale: int  # of SCALE_TYPES
    zeros: bool
    spans: int

    file: ClassVar[str] = "w4a16_hopper.cu"

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one chunk."""
        scales = ROWS * self.spans * (4 if self.scale == 2 else 2)
        zeros = ROWS * self.spans if self.zeros else 0
        whole = self.tokens * CHUNK * 2 + ROWS * CHUNK // 2 + scales + zeros
        return -(-whole // STAGE_ALIGNMENT) * STAGE_ALIGNMENT

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread at the start, and of one that multiplies."""
        return next(held for most, held in REGISTERS.items() if self.tokens <= most)

    @property
    def settings(self) -> Mapping[str, object]:
        """The format, registers, and a product whose left operand lies in registers."""
        left = ", ".join(f"%{self.held + i}" for i in range(4))
        return {
            "SCALE": self.scale,
            "ZEROS": int(self.zeros),
            "SPANS": self.spans,
            "REGISTERS": self.registers[0],
            "CONSUMERS_HAVE": self.registers[1],
            "COPIERS_HAVE": COPIERS_HAVE,
            "WGMMA_LINE": self.wgmma(f"{{{left}}}, %{self.held + 4}, adds, 1, 1, 0"),
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
    # [block, warpgroup, warp, high, g, chunk, half, step, input high, c, input low]
    parts = codes.view(rows // ROWS, 4, 4, 2, 8, columns // CHUNK, 2, 4, 2, 4, 2)
    # -> [block, chunk, warpgroup, half, warp, g, c, step, input low, input high, high]
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


def matmul(x: Tensor, weight: Prepared) -> Tensor:
    """Multiply. x: [n, K] float16 or bfloat16, rows contiguous -> [n, N] of x's dtype."""
    _require(x, weight)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    for rows, out in hopper.launches(x, y):
        _launch(rows, weight, out)
    return y


def build(weight: Prepared, dtype: torch.dtype) -> None:
    """Compile what `matmul` may need of a weight, for every number of tokens. dtype: of x."""
    hopper.compile_widths(lambda n: _variant(weight, dtype, n), weight.words.device)


def _variant(weight: Prepared, dtype: torch.dtype, n: int) -> Variant:
    return Variant(
        tokens=hopper.width_of(n),
        bf16=dtype == torch.bfloat16,
        scale=SCALE_TYPES[weight.scales.dtype],
        zeros=weight.zeros is not None,
        spans=_spans(weight.group, weight.shape[1]),
    )


def _launch(x: Tensor, weight: Prepared, y: Tensor) -> None:
    n, k = x.shape
    variant = _variant(weight, x.dtype, n)
    blocks, chunks = weight.words.shape[:2]
    tiles = blocks // 2
    pairs = min(hopper.multiprocessors(x.device) // 2, tiles * chunks)
    parts, counters = hopper.workspace(x.device)
    own_group = max(1, -(-min(weight.group, k) // CHUNK))
    zeros = weight.scales if weight.zeros is None else weight.zeros
    hopper.function(variant, x.device).launch(
        2 * pairs,
        THREADS,
        variant.shared_bytes,
        [
            tensor_map(x, variant.tokens),
            *(ctypes.c_void_p(t.data_ptr()) for t in (weight.words, weight.scales, zeros)),
            *(ctypes.c_void_p(t.data_ptr()) for t in (parts, counters, y)),
            *(ctypes.c_uint(v) for v in (n, weight.shape[0], tiles, chunks, own_group)),
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


def _require(x: Tensor, weight: Prepared) -> None:
    require_rows(x, weight.shape[1])
    require_prepared(x, (weight.words, weight.scales, weight.zeros))
