"""Which drafts stand: one walk down the tree, under a rule that picks the target's own token.

Both rules emit, at every position, a token that depends on the target's logits there and on
nothing a drafter did. So speculation cannot change the output, only how many tokens one read of
the target yields.

Greedy: the first choice of the target.

Sampled: Gumbel-max sampling, argmax_i (logit_i / T + g_i), with noise g keyed by (seed, position)
alone. The token is distributed exactly as softmax(logits / T), for every tree, chain and
hierarchy, because what is picked depends on the target's logits and the noise alone, never on the
tree: descending to the child that equals the sampled token is the "naive sampling" verification of
SpecInfer (Miao et al. 2024, arXiv 2305.09781, section 4.3), whose acceptance at a node is the
target's probability of its children, as in EAGLE's rule for distinct children. Keying the noise by
position makes the drawn text the same for every drafter (drafter-invariant speculation: Daliri,
Musco and Suresh 2024, arXiv 2408.07978), and a drafter that samples with the same noise is
accepted more often than an independent one.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.fused import argmax
from methods.tree import Tree


class Rule(ABC):
    """Picks the token that a model itself would emit next: the one of highest score."""

    @property
    @abstractmethod
    def graphed(self) -> bool:
        """Whether `pick` can be captured: it waits for nothing (methods.graph)."""

    @abstractmethod
    def scores(self, logits: Tensor, positions: Tensor, *, seed: Tensor) -> Tensor:
        """logits: [n, V]; positions: [n], where the picked token will stand -> [n, V].

        seed: [1] int64.
        """

    def pick(self, logits: Tensor, positions: Tensor, *, seed: Tensor) -> Tensor:
        """Take the first of the best. Arguments as of `scores` -> [n] int64."""
        return argmax(self.scores(logits, positions, seed=seed))

    def choose(self, tree: Tree, logits: Tensor, positions: Tensor, *, seed: Tensor) -> Tensor:
        """Take the token that follows each node of a tree: its own pick, whatever the tree is.

        Replayed acceptance alone looks at the tree. Arguments as of `scores` -> [n] int64.
        """
        return self.pick(logits, positions, seed=seed)

    def smaller(self) -> "Rule":
        """The rule of a smaller model's own method: the same."""
        return self


@dataclass(frozen=True, kw_only=True)
class Greedy(Rule):
    """The most likely token; the first of equals."""

    @property
    def graphed(self) -> bool:
        """Looks at the logits alone."""
        return True

    def scores(self, logits: Tensor, positions: Tensor, *, seed: Tensor) -> Tensor:
        """Score by the logits as they are."""
        return logits


@dataclass(frozen=True, kw_only=True)
class Sampled(Rule):
    """A draw from softmax(logits / temperature), with noise keyed by seed and position."""

    temperature: float

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    @property
    def graphed(self) -> bool:
        """The host must know the positions to draw their noise."""
        return False

    def scores(self, logits: Tensor, positions: Tensor, *, seed: Tensor) -> Tensor:
        """Nodes of the same position share their noise; at most one of them is emitted."""
        unique, row = torch.unique(positions, return_inverse=True)
        noise = torch.stack(
            [
                _exponential(logits.shape[-1], int(seed), p, logits.device)  # sync
                for p in unique.tolist()
            ]
        )
        # log-probability minus log of an exponential draw: Gumbel-max in the form that never
        # takes the logarithm of a rounded-off uniform.
        return (logits.double() / self.temperature).log_softmax(dim=-1) - noise.log()[row]


def _exponential(size: int, seed: int, position: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device=device)
    generator.manual_seed(_mix(seed, position))
    draw = torch.empty(size, dtype=torch.float64, device=device)
    return draw.exponential_(generator=generator)


def _mix(seed: int, position: int) -> int:
    """SplitMix64's finaliser: neighbouring seeds and positions give unrelated streams."""
    x = (seed * 0x9E3779B97F4A7C15 + position + 1) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return (x ^ (x >> 31)) & (2**63 - 1)
