"""A draft is a tree of tokens; a sequence is a tree without branches; one token is a root."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """Proposed tokens, each below the token it follows.

    tokens: [n] int64; node 0 is the root: decided, not yet read by the target.
    parents: [n] int64; parents[0] == -1, and parents[i] < i for every other node.
    """

    tokens: Tensor
    parents: Tensor

    def __post_init__(self) -> None:
        assert self.tokens.ndim == 1
        assert self.tokens.shape == self.parents.shape

    @classmethod
    def chain(cls, tokens: Sequence[int], device: torch.device) -> Self:
        """Make a tree without branches; tokens[0] is the root."""
        return cls(
            tokens=torch.tensor(tokens, dtype=torch.int64, device=device),
            parents=torch.arange(-1, len(tokens) - 1, device=device),
        )

    def after(self, unread: Sequence[int]) -> "Tree":
        """Hang this tree below a chain of decided tokens, so that one pass reads both."""
        if not unread:
            return self
        head = Tree.chain(unread, self.tokens.device)
        return Tree(
            tokens=torch.cat([head.tokens, self.tokens]),
            parents=torch.cat([head.parents, self.parents + len(unread)]),
        )

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @cached_property
    def mask(self) -> Tensor:
        """[n, n] bool: whether j is i or an ancestor of i."""
        n = len(self)
        if n == 1:
            return self.parents[:, None] < 0
        index = torch.arange(n, device=self.tokens.device)
        reach = (index[:, None] == index) | (self.parents[:, None] == index)
        steps = 1  # `reach` spans this many generations; each squaring doubles it
        while steps < n - 1:
            reach = (reach.float() @ reach.float()) > 0
            steps *= 2
        return reach

    @cached_property
    def depths(self) -> Tensor:
        """[n] int64: number of ancestors; 0 for the root."""
        return self.mask.sum(dim=1) - 1
