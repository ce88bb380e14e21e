"""Few tokens times 4-bit weights on Hopper: `x @ dequant(W).T`, in one of three forms.

    digits   y[t, r] = sum over parts of K, in order, of the sum over their spans, in order, of
                       s[g, r] * v[b, t] * dot(c - z[g, r], d[t]) where x = v * d in block
                       floating point (quant.block_float), b the span's block
    halves   the same with the sum over up to 512 inputs, in order, of w * x, where w is
                       s[g, r] * (c - z[g, r]) in float16, and so are s and these sums
    floats   the same with s[g, r] * dot(c - z[g, r], x[t])

else in float32. A span is a chunk of 128 inputs, or 64 where groups g are no longer; c - z is
exact; a dot of digits is exact, one of floats is one tensor-core sum. How K is parted depends on
the shape and the device alone: in each form a row has the same bits however many tokens n are read
with it. Digits are the fastest of few tokens (`form_of`); of many halves are, and err by 9e-4 of
norms where digits and floats err by 2e-4 (H200, inputs and weights random; up to 1.2e-3 where one
input is a hundred times the others). The kernel is w4a16_hopper.cu.

What it reads is cut into blocks of 256 outputs and chunks of 128 inputs; N and K are filled up to
whole pairs of blocks and whole chunks with codes and scales that add nothing:

    words  [N / 256, K / 128, 4, 2, 128, 4] int32   tile, half of the chunk, thread, step
    scales [N / 256, steps, 256 * spans]            in the stored dtype; a step holds `spans` groups
    zeros  likewise, uint8
    boosts [N / 256, 256] float16                   see below

A word holds what one thread multiplies in one 16-input step of wgmma: of rows g and g + 8 and
inputs 2c, 2c + 8, 2c + 1 and 2c + 9, a byte each, row g in its low half (g = lane / 4, c = lane %
4; PTX ISA, register fragments of A). Two words are a 32-input step of digits, which stand in that
order (block_float.ORDER). Where no zeros are stored a nibble is its code less 8, in two's
complement. Rows g and g + 8 lie side by side in scales, zeros and boosts.

Codes are so many of float16's smallest numbers, 2^-24, in halves. `boosts` are powers of two, one a
row, by which scales are multiplied there so that weights are normal numbers: a row's largest scale
becomes one of 2^15 ... 2^16, or as near as BOOSTS go. Scales of groups whose weights are all 0 do
not count, whatever they are. Sums in float16 are then normal numbers too, for inputs of 1e-3 to
1,000 in the mean if these are random; they would pass its largest where 512 inputs are 250 in the
mean, or 130 if zeros are stored, and all have the sign of weights that are the largest.
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from quant.block_float import BLOCK, BlockFloat
from quant.kernels import hopper
from quant.kernels.hopper import STAGE_ALIGNMENT, WIDEST, digits_map, tensor_map
from quant.kernels.int4 import MIDDLE, exact_product, require_prepared, require_rows
from quant.pack import pack_nibbles, unpack_nibbles

ROWS, CHUNK = 256, BLOCK  # of a block, of a stage
PAIR = 2 * ROWS  # outputs of a cluster of two
AT_ONCE = 32 * PAIR  # rows put in order at once: half a dozen forms of them lie side by side
COPIERS = 128  # threads beside those that multiply; two of them copy
# Registers of a thread by tokens: at the start, then of those that multiply, and of the others, who
# give up theirs. What few tokens leave, other kernels' blocks may have beside this one.
REGISTERS = {16: (112, 144, 40), 64: (168, 232, 40)}
# Of four warpgroups, that share what there is. With 8 less the widest are 1 % faster, at 4 to 12
# bytes outside of registers, and 48 tokens 1 % slower (H200).
HALVES_REGISTERS = {48: (96, 112, 32), 64: (88, 104, 24)}
# Tokens up to which digits are faster than halves, and than floats (H200, LOG.md).
DIGITS_MOST = {torch.float16: 24, torch.bfloat16: 32}
BOOSTS = (-24, 15)  # powers of two in float16
SCALE_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
Form = Literal["digits", "halves", "floats"]
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A weight as the kernel reads it; the layouts are told above.

    shape: N and K as stored. group: inputs under one scale.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    boosts: Tensor
    shape: tuple[int, int]
    group: int


@dataclass(frozen=True, kw_only=True)
class Variant(hopper.Variant):
    """What a binary is compiled for."""

    form: Form
    scale: int  # of SCALE_TYPES
    zeros: bool
    spans: int

    def __post_init__(self) -> None:
        assert self.whole or self.bf16 == (self.form == "floats")

    @property
    def files(self) -> tuple[str, ...]:
        """What a chunk is, the form, and the kernel."""
        plain = () if self.whole else ("w4a16_plain.cuh",)
        return "w4a16_chunk.cuh", *plain, f"w4a16_{self.form}.cuh", "w4a16_hopper.cu"

    @property
    def groups(self) -> int:
        """Warpgroups that multiply."""
        return 4 if self.form == "halves" else 2

    @property
    def threads(self) -> int:
        """Of a block."""
        return 128 * self.groups + COPIERS

    @property
    def token_bytes(self) -> tuple[int, int]:
        """Of a token's inputs in a chunk, and of their scale."""
        return 2 * CHUNK, 4 if self.whole else 0

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
        return 2 * self.tokens if self.whole else self.tokens

    @property
    def sums(self) -> hopper.Sums:
        """Digits are integers, as codes are."""
        kinds: dict[Form, hopper.Sums] = {"digits": "s32", "halves": "f16", "floats": "f32"}
        return kinds[self.form]

    @property
    def registers(self) -> tuple[int, int, int]:
        """Of a thread at the start, of one that multiplies, and of another."""
        by_tokens = HALVES_REGISTERS if self.form == "halves" else REGISTERS
        return next(held for most, held in by_tokens.items() if self.tokens <= most)

    @property
    def settings(self) -> Mapping[str, object]:
        """The format, registers, and a product whose left operand lies in registers."""
        first, consumers, copiers = self.registers
        left = ", ".join(f"%{self.held + i}" for i in range(4))
        adds = "adds" if self.whole else "adds, 1, 1, 0"
        return {
            "X_A_TOKEN": self.token_bytes[0],
            "X_SCALE_BYTES": self.token_bytes[1],
            "PART_REGISTER": f'"{self.register}"',
            "SCALE": self.scale,
            "ZEROS": int(self.zeros),
            "SPANS": self.spans,
            "GROUPS": self.groups,
            "REGISTERS": first,
            "CONSUMERS_HAVE": consumers,
            "COPIERS_HAVE": copiers,
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
    shape = (-(-n // PAIR) * PAIR // ROWS, -(-k // CHUNK), 4, 2, CHUNK, 4)
    words = torch.empty(shape, dtype=torch.int32, device=packed.device)
    boosts = torch.empty(n, dtype=torch.float16, device=packed.device)
    for start in range(0, n, AT_ONCE):
        part = slice(start, start + AT_ONCE)
        codes = unpack_nibbles(packed[part])
        own_zeros = None if zeros is None else zeros[part]
        boosts[part] = _boosts(codes, scales[part], own_zeros)
        made = _words(codes, signed=zeros is None)
        words[start // ROWS : start // ROWS + len(made)] = made
    return Prepared(
        words=words,
        scales=_steps(scales, group, k),
        zeros=None if zeros is None else _steps(zeros, group, k),
        boosts=_steps(boosts.unsqueeze(1), k, k).view(-1, ROWS),
        shape=(n, k),
        group=group,
    )


def _words(codes: Tensor, *, signed: bool) -> Tensor:
    """Fill codes up to whole tiles and put them in order. [N, K] -> [N / 256, K / 128, ...]."""
    padding = (0, -codes.shape[1] % CHUNK, 0, -codes.shape[0] % PAIR)
    # With zeros stored, scales of 0 make them nothing.
    codes = torch.nn.functional.pad(codes, padding, value=MIDDLE)
    rows, columns = codes.shape
    if signed:
        codes = codes ^ MIDDLE  # its four bits are the code less 8
    # [block, tile, warp, high, g, chunk, half, step, input high, c, input low]
    parts = codes.view(rows // ROWS, 4, 4, 2, 8, columns // CHUNK, 2, 4, 2, 4, 2)
    # -> [block, chunk, tile, half, warp, g, c, step, input low, input high, high]
    parts = parts.permute(0, 5, 1, 6, 2, 4, 9, 7, 10, 8, 3).contiguous()
    words = pack_nibbles(parts.view(-1, 8)).view(torch.int32)
    return words.view(rows // ROWS, columns // CHUNK, 4, 2, CHUNK, 4)


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


def form_of(n: int, dtype: torch.dtype, *, exact: bool) -> Form:
    """Give the form in which n tokens of a dtype are read. exact: all in one, in digits."""
    if exact or n <= DIGITS_MOST[dtype]:
        return "digits"
    return "halves" if dtype == torch.float16 else "floats"


def matmul(x: Tensor, weight: Prepared, *, exact: bool = False) -> Tensor:
    """Multiply in the faster form. x: [n, K] float16 or bfloat16, rows contiguous -> [n, N].

    y is of x's dtype. exact: in digits, so that a row has the same bits at every n.
    """
    _require(x, weight)
    form = form_of(len(x), x.dtype, exact=exact)
    if form == "digits":
        from quant.kernels.blocks_triton import round_blocks

        return multiply(round_blocks(x), weight, x.dtype)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    for rows, out in hopper.launches(x, y):
        # What is left over 64 is few tokens too; narrower variants are of digits alone.
        variant = _variant(weight, x.dtype, max(len(out), DIGITS_MOST[x.dtype] + 1), form)
        _launch(variant, tensor_map(rows, variant.tokens), None, weight, out)
    return y


def multiply(x: BlockFloat, weight: Prepared, dtype: torch.dtype) -> Tensor:
    """Multiply what is in digits. x: n tokens of K inputs -> [n, N] of dtype."""
    _require_digits(x, weight)
    n = x.digits.shape[1]
    y = torch.empty(n, weight.shape[0], dtype=dtype, device=x.digits.device)
    for start in range(0, n, WIDEST):
        part = slice(start, start + WIDEST)
        variant = _variant(weight, dtype, len(y[part]), "digits")
        rows = digits_map(x.digits[:, part], variant.tokens)
        _launch(variant, rows, x.scales[:, part], weight, y[part])
    return y


def build(weight: Prepared, dtype: torch.dtype, *, exact: bool = False) -> None:
    """Compile what `matmul` may need of a weight, for every number of tokens. dtype: of x."""

    def variant(tokens: int) -> Variant:
        return _variant(weight, dtype, tokens, form_of(tokens, dtype, exact=exact))

    hopper.compile_widths(variant, weight.words.device)


def _variant(weight: Prepared, dtype: torch.dtype, n: int, form: Form) -> Variant:
    return Variant(
        tokens=hopper.width_of(n),
        bf16=dtype == torch.bfloat16,
        form=form,
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
        variant.threads,
        variant.shared_bytes,
        [
            x,
            ctypes.c_void_p(0 if x_scales is None else x_scales.data_ptr()),
            ctypes.c_uint(0 if x_scales is None else x_scales.stride(0)),
            *(ctypes.c_void_p(t.data_ptr()) for t in (weight.words, weight.scales, zeros)),
            *(ctypes.c_void_p(t.data_ptr()) for t in (weight.boosts, parts, counters, y)),
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
    # [block, sixteen rows, high, g, step, span]
    parts = padded.view(-1, ROWS // 16, 2, 8, padded.shape[1] // spans, spans)
    steps = parts.permute(0, 4, 5, 1, 3, 2)
    return steps.reshape(len(parts), -1, spans * ROWS).contiguous()


def _groups(steps: Tensor, n: int, groups: int) -> Tensor:
    """Undo `_steps`."""
    parts = steps.view(len(steps), -1, ROWS // 16, 8, 2)  # [block, group, sixteen rows, g, high]
    rows = parts.permute(0, 2, 4, 3, 1).reshape(-1, parts.shape[1])
    return rows[:n, :groups].contiguous()


def _boosts(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Give what a row's scales are multiplied by besides 2^15. codes: [N, K] -> [N] float16."""
    steps = codes.view(*scales.shape, -1)
    middle = MIDDLE if zeros is None else zeros.view(torch.int8).unsqueeze(-1)
    alive = (steps != middle).any(-1)
    largest = torch.where(alive, scales.abs().float(), 0).amax(1)
    # What float16 would round up to a power of two counts as it; largest < 2 ** exponent.
    exponent = torch.frexp(largest * (1 + 2.0**-11)).exponent
    exponent = (1 - exponent).clamp(*BOOSTS)
    return torch.ldexp(torch.ones_like(largest), exponent).half()


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
    require_prepared(digits, (weight.words, weight.scales, weight.zeros, weight.boosts))


def _require(x: Tensor, weight: Prepared) -> None:
    require_rows(x, weight.shape[1])
    require_prepared(x, (weight.words, weight.scales, weight.zeros, weight.boosts))
