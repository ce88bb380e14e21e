"""A tree's nodes read in three ways: at once, along chains, and one by one as plain decoding does.

Where every operation is exact, a node's logits have the same bits each way.

Letters: n nodes, V vocabulary.
"""

import torch
from torch import Tensor

from methods.kv import KVCache
from methods.transformer import Transformer, read_tree
from methods.tree import Tree


def in_a_tree(target: Transformer, kv: KVCache, tree: Tree) -> Tensor:
    """Read all nodes behind what is decided. -> logits [n, V]."""
    return _logits(target, kv, tree.tokens, tree.parents)


def in_chains(target: Transformer, kv: KVCache, tree: Tree) -> Tensor:
    """Read every leaf's path, from the root on, as a sequence. -> logits [n, V].

    A node of several paths has the logits of the last of them.
    """
    logits = torch.empty(0)
    for leaf in sorted(set(range(len(tree))) - set(tree.parents.tolist())):
        path = tree.ancestors[leaf, : int(tree.depths[leaf]) + 1].long()
        chain = torch.arange(-1, len(path) - 1, device=path.device)
        read = _logits(target, kv, tree.tokens[path], chain)
        if not len(logits):
            logits = read.new_full((len(tree), read.shape[1]), torch.nan)
        logits[path] = read
    return logits


def one_by_one(target: Transformer, kv: KVCache, tree: Tree) -> Tensor:
    """Decide every node's ancestors, then read it alone. -> logits [n, V]."""
    decided, logits = kv.length, {}
    root = torch.full_like(tree.parents[:1], -1)
    for node in _depth_first(tree.parents.tolist()):
        # What stands in the slots before is the node's own path: its parent was read last there.
        kv.rewind(decided + int(tree.depths[node]))
        logits[node] = _logits(target, kv, tree.tokens[node : node + 1], root)[0]
        kv.advance(1)
    kv.rewind(decided)
    return torch.stack([logits[node] for node in range(len(tree))])


def unequal(one: Tensor, other: Tensor) -> int:
    """Count the nodes whose logits differ in any bit. one, other: [n, V]."""
    return int((one.view(torch.uint8) != other.view(torch.uint8)).any(dim=1).sum())


def _logits(target: Transformer, kv: KVCache, tokens: Tensor, parents: Tensor) -> Tensor:
    base = torch.tensor([kv.length], device=tokens.device)
    read, _ = read_tree(target, kv, base, tokens[None], parents)
    return target.logits(read.hidden[0])


def _depth_first(parents: list[int]) -> list[int]:
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
    order, waiting = [], [0]
    while waiting:
        order.append(waiting.pop())
        waiting += children.get(order[-1], [])
    return order
