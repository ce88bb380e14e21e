"""One read of a cache: where new tokens go, and what each of them sees.

There are two, and they compute the same. `Slices` looks at the cache through slices whose ends the
host knows, so that every device and batch can read, and a prompt in long chunks. `Slots` finds the
end of what is decided in a tensor on the device, so that one CUDA graph serves every length.

Letters: B batch, n new tokens, H query heads, G key-value heads, S slots, d head dimension.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from methods.attention import attend, visible
from methods.kernels.attention import attend as attend_slots
from methods.kernels.rope_write import rope_write
from methods.kv import KVCache
from methods.norm import HeadNorm
from methods.rope import rotate


@dataclass(frozen=True, kw_only=True)
class Window(ABC):
    """What every layer of one read has in common.

    rotation: cosines and sines of the new tokens' positions, each [n, d].
    """

    kv: KVCache
    rotation: tuple[Tensor, Tensor]

    @abstractmethod
    def attend(
        self, layer: int, projected: Tensor, *, bias: Tensor | None, norm: HeadNorm | None
    ) -> Tensor:
        """Turn, write and attend. projected: [B, n, (H + 2G) * d] -> [B, n, H * d].

        bias: [(H + 2G) * d], added first. norm: of queries and keys, before they are turned.
        """


@dataclass(frozen=True, kw_only=True)
class Slices(Window):
    """Slices of the cache. seen: [n, S] as `visible` gives it."""

    seen: Tensor | None

    def attend(
        self, layer: int, projected: Tensor, *, bias: Tensor | None, norm: HeadNorm | None
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
        return attend(turned[:, :-groups], keys, values, self.seen)


@dataclass(frozen=True, kw_only=True)
class Slots(Window):
    """Slots behind a length that only the device knows; batch 1.

    base: [1] int64, the number of decided slots. mask: [n, scratch + n] bool over the scratch
    slots, None to read in order. ancestors: [n, depth] int32, the scratch slots of each token's
    path, itself last, then -1.
    """

    base: Tensor
    mask: Tensor | None
    ancestors: Tensor | None

    def attend(
        self, layer: int, projected: Tensor, *, bias: Tensor | None, norm: HeadNorm | None
    ) -> Tensor:
        """As in `Window`."""
        cache = self.kv.data[layer, :, 0]
        queries = rope_write(
            projected[0],
            *self.rotation,
            cache,
            self.base,
            self.kv.scratch,
            bias=bias,
            norm=None if norm is None else norm.weight,
            eps=0.0 if norm is None else norm.eps,
        )
        out = attend_slots(
            queries, cache, self.base, self.kv.scratch, self.mask, ancestors=self.ancestors
        )
        return out[None]


def window(
    kv: KVCache,
    rotation: tuple[Tensor, Tensor],
    mask: Tensor | None,
    *,
    n: int,
    base: Tensor | None,
    ancestors: Tensor | None,
) -> Window:
    """Open a read of n tokens behind all that is in the cache.

    base: [1], the length as the device knows it; None where the host's own is meant, which is the
    same number whenever something runs outside a graph.
    """
    kv.reserve(n)
    if base is not None and kv.data.is_cuda:
        return Slots(kv=kv, rotation=rotation, base=base, mask=mask, ancestors=ancestors)
    seen = visible(mask, n=n, length=kv.length, scratch=kv.scratch, device=kv.data.device)
    return Slices(kv=kv, rotation=rotation, seen=seen)
