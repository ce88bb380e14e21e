"""One read of a cache: where new tokens go, and what each of them sees.

There are three, and they compute the same. `Slices` looks at the cache through slices whose ends
the host knows, so that every device and batch can read. `Slots` finds the end of what is decided in
a tensor on the device, so that one CUDA graph serves every length. `Chunk` reads a prompt on a GPU:
kernels turn and write it as those of `Slots` do, since launches of torch's cost the host more than
the device needs for a layer; torch attends through slices.

Letters: B batch, n new tokens, H query heads, G key-value heads, S slots, d head dimension.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from methods import attention, fused
from methods.kv import KVCache
from methods.norm import HeadNorm
from methods.rope import rotate
from quant.block_float import BlockFloat


@dataclass(frozen=True, kw_only=True)
class Window(ABC):
    """What every layer of one read has in common."""

    kv: KVCache

    @abstractmethod
    def attend(
        self,
        layer: int,
        projected: Tensor,
        *,
        bias: Tensor | None,
        norm: HeadNorm | None,
        digits: bool,
    ) -> Tensor | BlockFloat:
        """Turn, write and attend. projected: [B, n, (H + 2G) * d] -> [B, n, H * d].

        bias: [(H + 2G) * d], added first. norm: of queries and keys, before they are turned.
        digits: whether they are wanted, of B * n rows; `Slots` alone gives them.
        """


@dataclass(frozen=True, kw_only=True)
class Slices(Window):
    """Slices of the cache.

    rotation: cosines and sines of the new tokens' positions, each [n, d]. seen: as `visible` gives
    it.
    """

    rotation: tuple[Tensor, Tensor]
    seen: Tensor | None

    def attend(
        self,
        layer: int,
        projected: Tensor,
        *,
        bias: Tensor | None,
        norm: HeadNorm | None,
        digits: bool,
    ) -> Tensor:
        """As in `Window`."""
        batch, n, _ = projected.shape
        groups, dim = self.kv.data.shape[3], self.kv.data.shape[5]
        biased = projected if bias is None else projected + bias
        fused = biased.view(batch, n, -1, dim).transpose(1, 2)
        turning = fused[:, :-groups]
        if norm is not None:
            turning = norm(turning)
        turned = rotate(turning, self.rotation)
        keys, values = self.kv.write(layer, turned[:, -groups:], fused[:, -groups:])
        return attention.attend(turned[:, :-groups], keys, values, self.seen)


@dataclass(frozen=True, kw_only=True)
class Fused(Window):
    """What one kernel turns and writes; batch 1.

    angles: cosines and sines of every position, each [S, d]. positions: [n] int64, of the new
    tokens. base: [1] int64, the number of decided slots.
    """

    angles: tuple[Tensor, Tensor]
    positions: Tensor
    base: Tensor

    def entering(
        self, layer: int, projected: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]:
        """What enters a layer's kernels, from `qkv` to `scratch`."""
        cache = self.kv.data[layer, :, 0]
        return projected[0], *self.angles, self.positions, cache, self.base, self.kv.scratch


@dataclass(frozen=True, kw_only=True)
class Slots(Fused):
    """Slots behind a length that only the device knows. ancestors: as `window` takes them."""

    ancestors: Tensor | None

    def attend(
        self,
        layer: int,
        projected: Tensor,
        *,
        bias: Tensor | None,
        norm: HeadNorm | None,
        digits: bool,
    ) -> Tensor | BlockFloat:
        """As in `Window`."""
        mixed = fused.rope_attend(
            *self.entering(layer, projected),
            ancestors=self.ancestors,
            digits=digits,
            **_asked(bias, norm),
        )
        return mixed if isinstance(mixed, BlockFloat) else mixed[None]


@dataclass(frozen=True, kw_only=True)
class Chunk(Fused):
    """Slots whose end the host knows as well. seen: as `visible` gives it."""

    seen: Tensor | None

    def attend(
        self,
        layer: int,
        projected: Tensor,
        *,
        bias: Tensor | None,
        norm: HeadNorm | None,
        digits: bool,
    ) -> Tensor:
        """As in `Window`."""
        queries = fused.rope_write(*self.entering(layer, projected), **_asked(bias, norm))
        end = self.kv.length + self.kv.scratch + len(queries)
        keys, values = self.kv.data[layer, :, :, :, :end]
        return attention.attend(queries.transpose(0, 1)[None], keys, values, self.seen)


class _Asked(TypedDict):
    norm: Tensor | None
    eps: float
    bias: Tensor | None


def _asked(bias: Tensor | None, norm: HeadNorm | None) -> _Asked:
    """What is done to queries and keys before they are turned, by the kernels' names."""
    if norm is None:
        return {"norm": None, "eps": 0.0, "bias": bias}
    return {"norm": norm.weight, "eps": norm.eps, "bias": bias}


def window(
    kv: KVCache,
    positions: Tensor,
    ancestors: Tensor | None,
    *,
    shared: int,
    base: Tensor | None,
) -> Window:
    """Open a read of n tokens behind all that is in the cache. positions: [n] int64. shared: H / G.

    ancestors: [n, depth] int32, the scratch slots of each token's path, itself last, then -1; None
    to read in order. base: [1], the number of decided slots where only the device knows it.
    """
    n, angles, device = len(positions), kv.angles, kv.data.device
    assert angles is not None
    kv.reserve(n)
    by_kernels = fused.attends(kv.data) and kv.data.shape[2] == 1
    if by_kernels and base is not None:
        return Slots(kv=kv, angles=angles, positions=positions, base=base, ancestors=ancestors)
    seen = attention.visible(
        ancestors, n=n, shared=shared, length=kv.length, scratch=kv.scratch, device=device
    )
    if by_kernels:
        base = torch.full((1,), kv.length, device=device)
        return Chunk(kv=kv, angles=angles, positions=positions, base=base, seen=seen)
    cos, sin = angles
    return Slices(kv=kv, rotation=(cos[positions], sin[positions]), seen=seen)
