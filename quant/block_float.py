"""Activations in block floating point: 16-bit integers that share a power of two.

A row is cut into blocks of 128 inputs. A block's values are whole multiples of a power of two, the
least under which the largest of them is at most 32,639 in size; what lies between is rounded, ties
to even. Whatever is at least an eighth of its block's largest value is exact where it has
float16's 11 bits, and nothing is farther from x than 2^-14 of that value. Where inputs are normal
a product errs by 3e-5 of the norms of x and the weights: less than by being rounded to float16.

An integer v is kept as two digits, v = 256 * first + second, each of which is an int8: what tensor
cores multiply without any rounding. Of every 16 inputs the digits stand in the order of ORDER,
which is that of a thread's inputs in one product of 16-bit numbers, so that the same weights serve
both.

Letters: n tokens, K in-features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128  # inputs
BASE = 256  # of a digit
HIGHEST = 127 * BASE + 127
ALIGNED = 8  # rows of scales are filled up to so many tokens, as tiles of kernels are
# A power of two and its inverse are both normal numbers of float32 within these.
LEAST, MOST = -100, 127
# PTX ISA, m16n8k16, fragments of A: a thread has inputs 2c, 2c + 1, 2c + 8 and 2c + 9.
ORDER = [2 * c + high * 8 + low for c in range(4) for low in range(2) for high in range(2)]


class BlockFloat(NamedTuple):
    """Rounded activations. K is filled up to whole blocks, and n in scales to ALIGNED.

    digits: [2, n, K] int8, 0 where filled up. scales: [K / 128, n] float32, undefined there; NaN
    where a block has a value that is not finite.
    """

    digits: Tensor
    scales: Tensor


def empty(n: int, k: int, device: torch.device) -> BlockFloat:
    """Make room for n rows of K inputs."""
    blocks = -(-k // BLOCK)
    digits = torch.empty(2, n, blocks * BLOCK, dtype=torch.int8, device=device)
    room = -(-n // ALIGNED) * ALIGNED
    return BlockFloat(digits, torch.empty(blocks, room, dtype=torch.float32, device=device))


def round_blocks(x: Tensor) -> BlockFloat:
    """Round rows. x: [n, K] of a float dtype up to float32."""
    n, k = x.shape
    made = empty(n, k, x.device)
    padded = torch.nn.functional.pad(x.float(), (0, -k % BLOCK)).view(n, -1, BLOCK)
    # The bits of positive floats are in the floats' order, infinity and NaN above all.
    bits = (padded.view(torch.int32) & 0x7FFFFFFF).amax(-1)
    exponent, top = (bits >> 23) - 127, bits.view(torch.float32)
    finite = exponent < MOST + 1
    exponent = exponent.clamp(LEAST, MOST)
    shift = 14 - exponent
    shift = shift - (torch.ldexp(top, shift) > HIGHEST).to(shift.dtype)
    whole = torch.ldexp(padded, shift.unsqueeze(-1)).round_()
    whole = torch.where(finite.unsqueeze(-1), whole, 0.0).to(torch.int32)
    whole = whole.view(n, -1, 16)[..., ORDER].view(n, -1)
    first = (whole + BASE // 2) >> 8
    made.digits[0] = first.to(torch.int8)
    made.digits[1] = (whole - BASE * first).to(torch.int8)
    scale = torch.ldexp(torch.ones_like(top), -shift)
    made.scales[:, :n] = torch.where(finite, scale, torch.nan).t()
    made.scales[:, n:] = 0
    return made


def values(rounded: BlockFloat, k: int) -> Tensor:
    """Give what the digits stand for. -> [n, K] float64."""
    first, second = rounded.digits.double()
    n = len(first)
    whole = torch.empty_like(first).view(n, -1, 16)
    whole[..., ORDER] = (first * BASE + second).view(n, -1, 16)
    scales = rounded.scales[:, :n].t().double().unsqueeze(-1)
    return (whole.view(n, -1, BLOCK) * scales).view(n, -1)[:, :k]
