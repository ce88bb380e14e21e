"""The parts of a decode step that are no matrix product, fused so that a CUDA graph can hold them.

On a GPU each is a launch or two of a Triton kernel, and nothing is read on the host: how many slots
are decided is a tensor on the device. On the CPU they are plain torch.

Letters: n new tokens, H query heads, G key-value heads, S slots, d head dimension, P positions,
D hidden, I inner width of the feed-forward layer, V vocabulary, L layers.

What a layer reads comes as it is, or on demand as digits: the same, rounded as
`quant.block_float.round_blocks` does, by the same launches (sizes that are no whole blocks of a
program take one more).
"""

import torch
from torch import Tensor

from methods.expansion import Expansion, Level
from methods.kernels import reference
from quant.block_float import BlockFloat
from quant.grid import Tokens


def fuses(x: Tensor) -> bool:
    """Whether kernels compute in x's dtype where it lies; float64 is for oracles, in torch."""
    return x.is_cuda and x.dtype != torch.float64


def attends(cache: Tensor) -> bool:
    """Whether `rope_write` and `attend` take a cache, [..., d], as kernels."""
    dim = cache.shape[-1]
    return fuses(cache) and dim & (dim - 1) == 0


def attend(
    queries: Tensor,
    cache: Tensor,
    base: Tensor,
    scratch: int,
    *,
    ancestors: Tensor | None,
    digits: bool = False,
) -> Tensor | BlockFloat:
    """Attend over all decided slots and over a node's own path. [n, H, d] -> [n, H * d].

    cache: [2, G, S, d], a layer's keys and values, those of the new tokens included. base: [1]
    int64, how many slots are decided; `scratch` slots behind them were read before these tokens.
    ancestors: [n, depth] int32; column t is the scratch slot of the node's ancestor at depth t,
    the node itself last, then -1. None where tokens are read in order, after all of scratch.
    digits: one launch more unless d is a block.

    On a GPU a node's result is bit-equal whether its ancestors are decided or scratch, and however
    many nodes are read with it.
    """
    _, groups, _, dim = cache.shape
    assert queries.shape[1] % groups == 0
    assert queries.shape[2] == dim
    assert queries.is_contiguous()
    assert cache.stride(3) == 1
    assert ancestors is None or (ancestors.dtype == torch.int32 and ancestors.is_contiguous())
    if fuses(queries):
        from methods.kernels import attention

        return attention.attend(queries, cache, base, scratch, ancestors=ancestors, digits=digits)
    return reference.attend(queries, cache, base, scratch, ancestors=ancestors, digits=digits)


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cache: Tensor,
    base: Tensor,
    scratch: int,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Turn queries and keys, write keys and values behind all slots. -> queries, [n, H, d].

    qkv: [n, (H + 2G) * d], as projected. cos, sin: [P, d] of `Rope.angles`, a row a position.
    positions: [n] int64. cache: [2, G, S, d]. base: [1] int64; slots base + scratch + i are
    written. norm: [H + G, 1, d], the weights of `HeadNorm`, with its eps. bias: [(H + 2G) * d].
    """
    assert qkv.is_contiguous()
    assert positions.is_contiguous()
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert cache.stride(3) == 1
    if fuses(qkv):
        from methods.kernels import rope_write as kernel

        return kernel.rope_write(
            qkv, cos, sin, positions, cache, base, scratch, norm=norm, eps=eps, bias=bias
        )
    return reference.rope_write(
        qkv, cos, sin, positions, cache, base, scratch, norm=norm, eps=eps, bias=bias
    )


def rope_attend(
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
    digits: bool = False,
) -> Tensor | BlockFloat:
    """`rope_write`, then `attend`; on Hopper one launch does both, where nothing else is asked for.

    Arguments as theirs. The positions of a node and its ancestors follow one another.
    """
    assert qkv.is_contiguous()
    assert positions.is_contiguous()
    assert ancestors is None or (ancestors.dtype == torch.int32 and ancestors.is_contiguous())
    if fuses(qkv) and norm is None and bias is None:
        from methods.kernels import attention_hopper as kernel

        if kernel.takes(cache, qkv.shape[1] // cache.shape[3] - 2 * cache.shape[1]):
            table = (qkv, cos, sin, positions, cache, base, scratch)
            return kernel.rope_attend(*table, ancestors=ancestors, digits=digits)
    queries = rope_write(
        qkv, cos, sin, positions, cache, base, scratch, norm=norm, eps=eps, bias=bias
    )
    return attend(queries, cache, base, scratch, ancestors=ancestors, digits=digits)


def join(table: Tensor, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Put each token's row of a table beside its hidden vector. tokens: [n] -> [n, 2D].

    table: [N, D]. hidden: [n, D], of the same dtype.
    """
    if fuses(hidden):
        from methods.kernels import join as kernel

        assert table.is_contiguous()
        assert table.dtype == hidden.dtype
        return kernel.join(table, tokens.contiguous(), hidden.contiguous())
    return torch.cat([table[tokens], hidden], dim=1)


def add(x: Tensor, y: Tensor) -> Tensor:
    """Add, rounded to the dtype. x: [n, D]; y: [n, D], or [D] for all rows, of the same dtype."""
    if fuses(x):
        from methods.kernels import join as kernel

        assert x.dtype == y.dtype
        return kernel.add(x.contiguous(), y.contiguous())
    return x + y


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, digits: bool = False
) -> tuple[Tensor | BlockFloat, Tensor]:
    """Add, round to the dtype, then norm: the normed sum and the sum. x, residual: [n, D]."""
    assert x.is_contiguous()
    assert residual is None or residual.is_contiguous()
    if fuses(x):
        from methods.kernels import norm

        return norm.add_norm(x, residual, weight, eps, digits=digits)
    return reference.add_norm(x, residual, weight, eps, digits=digits)


def add_norm_round(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tokens, Tensor]:
    """Give what `add_norm` gives, the normed sum rounded to int8 as `round_tokens` does."""
    assert x.is_contiguous()
    assert residual is None or residual.is_contiguous()
    if fuses(x):
        from methods.kernels import norm

        return norm.add_norm_round(x, residual, weight, eps)
    return reference.add_norm_round(x, residual, weight, eps)


def silu_mul(gate_up: Tensor, *, digits: bool = False) -> Tensor | BlockFloat:
    """Gate one half by the other. [n, 2I], the gate first -> [n, I]."""
    assert gate_up.is_contiguous()
    if fuses(gate_up):
        from methods.kernels import gate

        return gate.silu_mul(gate_up, digits=digits)
    return reference.silu_mul(gate_up, digits=digits)


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


def expand(
    level: Level,
    expansion: Expansion,
    output: Tensor,
    logprobs: Tensor,
    ids: Tensor,
    kept: Tensor | None,
    *,
    first: int,
    column: int,
    slot: int,
) -> Level:
    """Let each node of a level have k children; the best k of all children are the next level.

    By the probability of the whole path, the earliest of equals first. output: [m, D], what the
    head gave at the level's nodes. logprobs, ids: [m, k], of their likeliest tokens, best first.
    kept: the target's id of each of these ids; None where they are the same.

    All children join the expansion, from place `first` on, a parent's together. `column` of
    ancestors is the next level's own, whose nodes will lie in scratch from `slot` on.
    """
    place = {"first": first, "column": column, "slot": slot}
    if fuses(output):
        from methods.kernels import expansion as kernel

        return kernel.expand(level, expansion, output, logprobs, ids, kept, **place)
    return reference.expand(level, expansion, output, logprobs, ids, kept, **place)


def prune(root: Tensor, expansion: Expansion, *, keep: int) -> tuple[Tensor, Tensor]:
    """Keep the best `keep` nodes below the root, [1]: tokens and parents of a `Tree`.

    In order of place. Of equals the earlier stays, so that no child loses its parent.
    """
    assert 0 <= keep <= len(expansion.tokens)
    if expansion.scores.is_cuda:
        from methods.kernels import expansion as kernel

        return kernel.prune(root, expansion, keep=keep)
    return reference.prune(root, expansion, keep=keep)


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
