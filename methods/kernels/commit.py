"""Move accepted drafts to the end of the decided slots, in all layers by one launch.

Letters: L layers, G key-value heads, S slots, d head dimension.
"""

import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.early import admit, await_earlier, early

# Slots that are read before any of them is written.
BATCH = tl.constexpr(16)


@triton.jit
def _commit(
    caches,
    base_at,
    nodes,
    count_at,
    stride_layer,
    stride_kind,
    stride_group,
    stride_slot,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One head's keys or values of one layer.

    Nodes increase and never stand before their place, so that a batch never overwrites what a
    later one reads; within a batch the barrier parts reads from writes.
    """
    admit(EARLY)
    await_earlier(EARLY)
    program = tl.program_id(0).to(tl.int64)
    layer = program // (2 * GROUPS)
    kind = program // GROUPS % 2
    group = program % GROUPS
    base = tl.load(base_at)
    count = tl.load(count_at)
    dim = tl.arange(0, PADDED)
    caches += layer * stride_layer + kind * stride_kind + group * stride_group
    caches += base * stride_slot
    for first in range(0, count, BATCH):
        place = first + tl.arange(0, BATCH)
        node = tl.load(nodes + place, mask=place < count, other=0)
        moved = ((place < count) & (node != place))[:, None] & (dim < DIM)[None, :]
        entry = tl.load(caches + node[:, None] * stride_slot + dim[None, :], mask=moved)
        tl.debug_barrier()
        tl.store(caches + place[:, None] * stride_slot + dim[None, :], entry, mask=moved)
        tl.debug_barrier()


def commit(caches: Tensor, base: Tensor, nodes: Tensor, count: Tensor) -> None:
    """See `methods.fused.commit`."""
    layers, kinds, groups, _, dim = caches.shape
    _commit[(layers * kinds * groups,)](
        caches,
        base,
        nodes,
        count,
        *caches.stride()[:4],
        GROUPS=groups,
        DIM=dim,
        PADDED=triton.next_power_of_2(dim),
        num_warps=2,
        **early(caches.device),
    )
