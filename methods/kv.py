"""The key-value cache: slots of decided tokens, then slots of drafts that may be forgotten.

Letters: L layers, B batch, H key-value heads, S slots, n tokens read at once, d head dimension.
"""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, in one tensor [L, 2, B, H, S, d].

    Slots [0, length) are decided; the next `scratch` are drafts. A model writes scratch only;
    `advance` and `rewind` move the line between the two. Rejected drafts are overwritten, never
    erased: a memset costs more than the mask.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        batch: int = 1,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """angles: of the positions that may be read, each [S, d]; no position passes its slot."""
        if capacity < 1:
            raise ValueError(f"a cache must have at least 1 slot, got capacity={capacity}")
        self.data = torch.zeros(
            num_layers, 2, batch, num_kv_heads, capacity, head_dim, dtype=dtype, device=device
        )
        self.capacity = capacity
        # With the cache, since a graph that reads one at its address reads the other as well.
        self.angles = angles
        self.length = 0
        self.scratch = 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one decided token over all layers and batch rows."""
        return self.data.untyped_storage().nbytes() // self.capacity

    def reserve(self, n: int) -> None:
        """Check that n more tokens fit, or raise ValueError before any layer runs."""
        if (needed := self.length + self.scratch + n) > self.capacity:
            raise ValueError(f"the cache has {self.capacity} slots, {needed} are needed")

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new entries behind all others; give all entries so far.

        keys, values: [B, H, n, d] -> two views [B, H, length + scratch + n, d].
        """
        start = self.length + self.scratch
        end = start + keys.shape[2]
        own = self.data[layer]
        own[0, :, :, start:end] = keys
        own[1, :, :, start:end] = values
        return own[0, :, :, :end], own[1, :, :, :end]

    def extend(self, n: int) -> None:
        """Count n tokens that every layer has written as scratch."""
        self.scratch += n

    def advance(self, count: int) -> None:
        """Count the next `count` slots as decided too; forget the rest of scratch.

        Drafts that are kept but do not stand in order are moved there first (`fused.commit`).
        """
        assert self.length + count <= self.capacity
        self.length += count
        self.scratch = 0

    def rewind(self, length: int) -> None:
        """Forget all drafts, and the decided tokens from `length` on."""
        assert 0 <= length <= self.length
        self.length = length
        self.scratch = 0
