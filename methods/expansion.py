"""What a draft tree is chosen from, and the level of it that is expanded next.

Letters: c nodes of the expansion, K of a level, D hidden, d longest path.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """Every node that expanding the tree made below the root, with the probability of its path.

    tokens: [c] int64. parents: [c] int64, each an earlier node, or -1 for the root. scores:
    [c] float32, the logarithm; a child never scores above its parent.
    """

    tokens: Tensor
    parents: Tensor
    scores: Tensor

    @classmethod
    def empty(cls, count: int, device: torch.device) -> Self:
        """Make room for `count` nodes."""
        tokens, parents = torch.empty(2, count, dtype=torch.int64, device=device)
        scores = torch.empty(count, dtype=torch.float32, device=device)
        return cls(tokens=tokens, parents=parents, scores=scores)


@dataclass(frozen=True, kw_only=True)
class Level:
    """The nodes of one depth that are expanded next, best first.

    tokens, positions: [K] int64. places: [K] int64, each node's own in the expansion, -1 for
    the root. scores: [K] float32. hidden: [K, D], what the head reads beside their tokens: its own
    outputs at their parents. ancestors: [K, d] int32, the scratch slots of their paths, then -1.
    """

    tokens: Tensor
    positions: Tensor
    places: Tensor
    scores: Tensor
    hidden: Tensor
    ancestors: Tensor

    @classmethod
    def root(cls, tokens: Tensor, positions: Tensor, hidden: Tensor, *, deeper: int) -> Self:
        """Start from the last of m pairs that a head read in order, the first of all scratch.

        tokens, positions: [m] int64. hidden: [m, D]. deeper: how much longer paths may become.
        """
        slots = torch.arange(len(tokens), dtype=torch.int32, device=tokens.device)
        return cls(
            tokens=tokens[-1:],
            positions=positions[-1:],
            places=torch.full_like(tokens[-1:], -1),
            scores=torch.zeros(1, dtype=torch.float32, device=tokens.device),
            hidden=hidden[-1:],
            ancestors=F.pad(slots[None], (0, deeper), value=-1),
        )
