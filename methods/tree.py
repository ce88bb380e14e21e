"""A draft is a tree of tokens; a sequence is a tree without branches; one token is a root."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from methods.fused import ancestry


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
    def chain(cls, tokens: Sequence[int]) -> Self:
        """Make a tree without branches, on the host; tokens[0] is the root."""
        return cls(
            tokens=torch.tensor(tokens, dtype=torch.int64),
            parents=torch.arange(-1, len(tokens) - 1),
        )

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @cached_property
    def _ancestry(self) -> tuple[Tensor, Tensor, Tensor]:
        return ancestry(self.parents, len(self))

    @property
    def mask(self) -> Tensor:
        """[n, n] bool: whether j is i or an ancestor of i."""
        return self._ancestry[0]

    @property
    def depths(self) -> Tensor:
        """[n] int64: number of ancestors; 0 for the root."""
        return self._ancestry[1]

    @property
    def ancestors(self) -> Tensor:
        """[n, n] int32: every node's path from the root, itself last, then -1."""
        return self._ancestry[2]
