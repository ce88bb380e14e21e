"""Grids of representable values: their scales, and rounding to the nearest one.

A weight is cut into pieces that share a scale: a row (per channel), g neighbours in a row (per
group) or all of it (per tensor); here a piece is always the last dimension. A code c stands for
(c - zero) * scale. Activations get one scale per row, that is per token, from the row itself.
Rounding is to the nearest code, ties to the even one, and codes outside of the grid are clamped.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

INT8_MAX = 127
E4M3_MAX = 448.0
# Clipping ranges tried by the range search: 1.00, 0.99, ... 0.21 of the full one, as GPTQ's and
# QQQ's quantisers do (`grid=100, maxshrink=0.8`).
SHRINKS = tuple(1 - i / 100 for i in range(80))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The codes `low` ... `high`, and the code of 0.0, or None when every piece picks its own."""

    low: int
    high: int
    zero: int | None


INT8 = Grid(low=-INT8_MAX, high=INT8_MAX, zero=0)
INT4 = Grid(low=-7, high=7, zero=0)
UINT4_AROUND_8 = Grid(low=0, high=15, zero=8)
UINT4 = Grid(low=0, high=15, zero=None)


class Fit(NamedTuple):
    """Where a grid lies on each piece: scale [..., 1] in the stored dtype, zero [..., 1] int8."""

    scale: Tensor
    zero: Tensor


class Tokens(NamedTuple):
    """Rounded activations: codes [n, K]; scale [n, 1], float32 or float64."""

    codes: Tensor
    scale: Tensor


def widen(x: Tensor) -> Tensor:
    """Give x in the dtype of scales and epilogues: float64 stays, all others become float32."""
    return x if x.dtype == torch.float64 else x.float()


def require_group_size(group_size: int) -> None:
    """Raise ValueError unless a group is a whole row (-1) or an even number of inputs."""
    if group_size != -1 and (group_size < 2 or group_size % 2):
        raise ValueError(f"group_size must be -1 or even and positive, got {group_size}")


def num_groups(k: int, group_size: int) -> int:
    """Count the groups in a row of K inputs, or raise ValueError when they do not fill it."""
    if group_size == -1:
        return 1
    if k % group_size:
        raise ValueError(f"K must be a multiple of group_size={group_size}, got K={k}")
    return k // group_size


def pieces(weight: Tensor, group_size: int) -> Tensor:
    """Cut a weight into the pieces that share a scale. [N, K] -> [N, groups, K / groups]."""
    n, k = weight.shape
    return weight.reshape(n, num_groups(k, group_size), -1)


def fit(values: Tensor, grid: Grid, *, scale_dtype: torch.dtype, range_search: bool) -> Fit:
    """Lay a grid over each piece. values: [..., g] floating point.

    The full range is the piece's own, widened to hold zero. With `range_search` it is shrunk step
    by step, and the scale with the least squared error stays. Scales are rounded to the stored
    dtype first, so that codes and errors are those of the stored scale.
    """
    values = widen(values)
    best = _fit_within(values, grid, 1.0, scale_dtype)
    if not range_search:
        return best
    least = _squared_error(values, grid, best)
    for shrink in SHRINKS[1:]:
        found = _fit_within(values, grid, shrink, scale_dtype)
        error = _squared_error(values, grid, found)
        better = error < least
        least = torch.where(better, error, least)
        best = Fit(
            scale=torch.where(better, found.scale, best.scale),
            zero=torch.where(better, found.zero, best.zero),
        )
    return best


def encode(values: Tensor, grid: Grid, fit: Fit) -> Tensor:
    """Round to the nearest code. values: [..., g] -> int8 of the same shape."""
    values = widen(values)
    steps = (values / fit.scale.to(values.dtype)).round_()
    return steps.add_(fit.zero).clamp_(grid.low, grid.high).to(torch.int8)


def decode(codes: Tensor, fit: Fit) -> Tensor:
    """Give the values that codes stand for, float32. codes: [..., g] int8."""
    # Not in int8: a difference of two 8-bit codes has 9 bits.
    return (codes.float() - fit.zero) * fit.scale.float()


def round_tokens(x: Tensor) -> Tokens:
    """Round each row to int8 on a scale of absmax / 127. x: [n, K] -> codes int8."""
    x = widen(x)
    scale = _token_scale(x, INT8_MAX)
    return Tokens((x / scale).round_().to(torch.int8), scale)


def round_tokens_e4m3(x: Tensor) -> Tokens:
    """Round each row to e4m3 on a scale of absmax / 448. x: [n, K] -> codes float8_e4m3fn."""
    x = widen(x)
    scale = _token_scale(x, E4M3_MAX)
    return Tokens((x / scale).to(torch.float8_e4m3fn), scale)


def absmax_scale(values: Tensor, highest: float, scale_dtype: torch.dtype) -> Tensor:
    """Give absmax / highest of each piece, [..., g] -> [..., 1]; 1 where that is zero."""
    return _stored_scale(widen(values).abs().amax(-1, keepdim=True) / highest, scale_dtype)


def _token_scale(x: Tensor, highest: float) -> Tensor:
    # The floor keeps a row of zeros from becoming 0 / 0; such a row's codes are zero anyway.
    # By a tensor: a GPU multiplies by a number's reciprocal, which is another scale at times.
    absmax = x.abs().amax(-1, keepdim=True)
    return absmax.div_(torch.full_like(absmax, highest)).clamp_(min=torch.finfo(x.dtype).tiny)


def _fit_within(values: Tensor, grid: Grid, shrink: float, scale_dtype: torch.dtype) -> Fit:
    low = values.amin(-1, keepdim=True).clamp_(max=0)
    high = values.amax(-1, keepdim=True).clamp_(min=0)
    if grid.zero is not None:
        high = torch.maximum(high, -low)
        low = -high
    low, high = low * shrink, high * shrink
    scale = _stored_scale((high - low) / (grid.high - grid.low), scale_dtype)
    if grid.zero is not None:
        return Fit(scale, torch.full_like(scale, grid.zero, dtype=torch.int8))
    zero = (-low / scale.to(low.dtype)).round_().add_(grid.low).clamp_(grid.low, grid.high)
    return Fit(scale, zero.to(torch.int8))


def _squared_error(values: Tensor, grid: Grid, fit: Fit) -> Tensor:
    error = decode(encode(values, grid, fit), fit) - values
    return error.square_().sum(-1, keepdim=True)


def _stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    # A piece of zeros, or one too small for the dtype, has every code at zero whatever its scale;
    # GPTQ's quantiser takes 1 as well. It must only not divide by zero.
    rounded = scale.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise ValueError(
            f"a weight's scale must fit {dtype}, at most {torch.finfo(dtype).max:g}, "
            f"got {scale.max().item():g}"
        )
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)
