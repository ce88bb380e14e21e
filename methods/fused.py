"""The parts of a decode step that are no matrix product, fused so that a CUDA graph can hold them.

On a GPU each is one or two launches of a Triton kernel, and nothing is read on the host: how many
slots are decided is a tensor on the device. On the CPU they are plain torch.

Letters: n new tokens, H query heads, G key-value heads, S slots, d head dimension, P positions,
D hidden, I inner width of the feed-forward layer, V vocabulary, L layers.
"""

import torch
from torch import Tensor

from methods.kernels import reference

LEAST_HEAD = 32  # head dimension: half a head must fill a step of the matrix product


def fuses(x: Tensor) -> bool:
    """Whether kernels compute in x's dtype where it lies; float64 is for oracles, in torch."""
    return x.is_cuda and x.dtype != torch.float64


def attends(cache: Tensor) -> bool:
    """Whether `attend` takes a cache, [..., d], as a kernel."""
    dim = cache.shape[-1]
    return fuses(cache) and dim >= LEAST_HEAD and dim & (dim - 1) == 0


def attend(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cache: Tensor,
    base: Tensor,
    scratch: int,
    *,
    ancestors: Tensor | None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Turn queries and keys, write keys and values behind all slots, attend. -> [n, H * d].

    qkv: [n, (H + 2G) * d], as projected. cos, sin: [P, d] of `Rope.angles`, a row a position.
    positions: [n] int64. cache: [2, G, S, d], a layer's keys and values. base: [1] int64, how many
    slots are decided; `scratch` slots behind them were read before these tokens, which write slots
    base + scratch + i and attend over all decided slots and over their own path. ancestors:
    [n, depth] int32; column t is the scratch slot of the node's ancestor at depth t, the node
    itself last, then -1. None where tokens are read in order, after all of scratch. norm:
    [H + G, 1, d], the weights of `HeadNorm`, with its eps. bias: [(H + 2G) * d].

    On a GPU a node's result is bit-equal whether its ancestors are decided or scratch, and however
    many nodes are read with it. There base, positions, ancestors and decided slots may be read
    before earlier kernels have ended: between those that write them and this must stand at least
    one plain launch, such as torch's (methods.kernels.early).
    """
    _, groups, _, dim = cache.shape
    assert qkv.is_contiguous()
    assert qkv.dtype == cache.dtype
    assert positions.is_contiguous()
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert cache.stride(3) == 1
    assert ancestors is None or (ancestors.dtype == torch.int32 and ancestors.is_contiguous())
    if not fuses(qkv):
        return reference.attend(
            *(qkv, cos, sin, positions, cache, base, scratch),
            ancestors=ancestors,
            norm=norm,
            eps=eps,
            bias=bias,
        )
    from methods.kernels import attention, heads

    if norm is not None or bias is not None:
        qkv = heads.settle(qkv, groups=groups, dim=dim, norm=norm, eps=eps, bias=bias)
    inputs = (qkv, cos, sin, positions, cache, base, scratch)
    return attention.attend(*inputs, ancestors=ancestors)


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add, round to the dtype, then norm: the normed sum and the sum. x, residual: [n, D]."""
    assert x.is_contiguous()
    assert residual is None or residual.is_contiguous()
    if fuses(x):
        from methods.kernels import norm

        return norm.add_norm(x, residual, weight, eps)
    return reference.add_norm(x, residual, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Gate one half by the other. [n, 2I], the gate first -> [n, I]."""
    assert gate_up.is_contiguous()
    if fuses(gate_up):
        from methods.kernels import gate

        return gate.silu_mul(gate_up)
    return reference.silu_mul(gate_up)


def best(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Take the k likeliest of each row. [m, V] -> log-probabilities float32, ids int64, [m, k].

    In the order of the logits, which must be numbers; the earliest of equals first.
    """
    assert logits.is_contiguous()
    assert 1 <= k <= logits.shape[1]
    if fuses(logits):
        from methods.kernels import best as kernel

        return kernel.best(logits, k)
    return reference.best(logits, k)


def argmax(logits: Tensor) -> Tensor:
    """Take the first of each row's best. [m, V] -> [m] int64."""
    assert logits.is_contiguous()
    if fuses(logits):
        from methods.kernels import best as kernel

        return kernel.argmax(logits)
    return reference.argmax(logits)


def ancestry(parents: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give `Tree.mask` [n, n], `Tree.depths` [n], and every node's path from the root.

    parents: [n] int64, -1 for the root. levels: more than any depth. The paths, [n, levels] int32,
    end with the node itself, then -1.
    """
    if parents.is_cuda:
        from methods.kernels import tree

        return tree.ancestry(parents, levels)
    return reference.ancestry(parents, levels)


def walk(tokens: Tensor, parents: Tensor, picked: Tensor) -> Tensor:
    """Keep the longest path on which every token is the one picked at its parent.

    tokens, parents: [n] int64, of a tree whose siblings differ. picked: [n] int64, the target's own
    token after each node. Gives one tensor, [1 + 2n] int64: the number of nodes on the path; the
    path, n long; what was picked at each of its nodes, n long. Behind the path's end both are 0.
    """
    if tokens.is_cuda:
        from methods.kernels import tree

        return tree.walk(tokens, parents, picked)
    return reference.walk(tokens, parents, picked)


def commit(caches: Tensor, base: Tensor, nodes: Tensor, count: Tensor) -> None:
    """Move scratch slots base + nodes[j] to base + j, in every layer, for the first `count` of j.

    caches: [L, 2, G, S, d]. base, count: [1] int64. nodes: int64, increasing up to count.
    """
    assert caches.stride(4) == 1
    if caches.is_cuda:
        from methods.kernels import commit as kernel

        kernel.commit(caches, base, nodes, count)
    else:
        reference.commit(caches, base, nodes, count)
