"""Acceptance by a profile: which drafts stand is drawn, while everything is computed all the same.

Where weights are random no drafter is ever right, and what a method costs depends on how often it
is. A profile says how likely the target's own token is each of a node's children; a seeded draw
for each position then takes a child, or the target's best token that nobody drafted. Every forward,
mask and commit is that of decoding; the tokens mean nothing.

Draws are keyed by (seed, level, position), so that a position's is the same for every drafter, and
those of a smaller model's own method are independent of the target's.

Letters: n nodes of a tree, V vocabulary.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.fused import argmax
from methods.tree import Tree
from methods.verify import Rule

MEASURED = "measured"
MAX_BRANCH = 512  # drafts in a row, beyond which a branch's length makes no difference
BISECTIONS = 60  # halvings of [0, 1], down to a float's own precision


class Acceptance(ABC):
    """Decides which drafts stand: what a yaml of conf/accept names. Frozen plain values."""

    @property
    @abstractmethod
    def label(self) -> str:
        """For records: `measured`, or `replay:<profile>`."""

    @abstractmethod
    def rule(self, own: Rule, *, level: int = 0) -> Rule:
        """Give the rule by which a target decodes whose own is given.

        level: 0 for the target, 1 for the smaller model's own method, and so on.
        """


@dataclass(frozen=True, kw_only=True)
class Measured(Acceptance):
    """The target's own tokens decide, as always."""

    @property
    def label(self) -> str:
        """Nothing is replayed."""
        return MEASURED

    def rule(self, own: Rule, *, level: int = 0) -> Rule:
        """The rule itself."""
        return own


@dataclass(frozen=True, kw_only=True)
class AcceptanceProfile(Acceptance, ABC):
    """Conditional acceptance: of a node's children, given that the node stands.

    name, source: for labels and readers. tau: tokens per step that it is to give, bonus included;
    None where it depends on the tree. small: what decides in a smaller model's own method.
    """

    name: str
    source: str
    tau: float | None
    small: Acceptance

    def __post_init__(self) -> None:
        if not self.name or not self.source:
            raise ValueError("a profile must have a name and a source, got an empty one")
        if self.tau is not None and not 1 <= self.tau < MAX_BRANCH:
            raise ValueError(f"tau must be 1 to {MAX_BRANCH - 1} tokens per step, got {self.tau}")

    @property
    def label(self) -> str:
        """Name it, with what it is to give."""
        return f"replay:{self.name}" + ("" if self.tau is None else f"(tau={self.tau:g})")

    def rule(self, own: Rule, *, level: int = 0) -> Rule:
        """Draw by this profile what the rule would have picked."""
        return Replay(own, self, level=level)

    @abstractmethod
    def table(self) -> list[list[list[float]]]:
        """Conditional acceptance, [branches][depths][ranks].

        branch: length of the tree's first branch. depth, rank: of a child below the root, and
        among its siblings. What lies beyond a dimension's end is as its last entry, but for ranks,
        beyond which nothing stands.
        """


@dataclass(frozen=True, kw_only=True)
class Conditional(AcceptanceProfile):
    """Acceptance by depth and sibling rank, as measured: conditional[depth][rank]."""

    conditional: list[list[float]]

    def __post_init__(self) -> None:
        super().__post_init__()
        rows = self.conditional
        if not rows or not all(row and min(row) >= 0 and sum(row) <= 1 + 1e-9 for row in rows):
            raise ValueError(
                "conditional must have a row for each depth, of probabilities by sibling rank that "
                f"sum to 1 at most, got {rows}"
            )

    def table(self) -> list[list[list[float]]]:
        """The same for every branch."""
        return [self.conditional]


@dataclass(frozen=True, kw_only=True)
class Constant(AcceptanceProfile):
    """The first child of every node stands with one probability, such that a step gives tau.

    That probability is solved for the length of each tree's own first branch, so tau is met
    whatever a dynamic tree's shape; a branch that is too short for tau stands whole.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau is None:
            raise ValueError("tau must be a number where acceptance is constant, got null")

    def table(self) -> list[list[list[float]]]:
        """One probability a branch."""
        assert self.tau is not None
        return [[[constant_for(self.tau, branch)]] for branch in range(MAX_BRANCH)]


def constant_for(tau: float, branch: int) -> float:
    """The p whose expected tokens per step over `branch` drafts in a row, sum of p^i, are tau."""
    if tau - 1 >= branch:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        p = (low + high) / 2
        tokens = (1 - p ** (branch + 1)) / (1 - p) if p < 1 else branch + 1
        low, high = (p, high) if tokens < tau else (low, p)
    return low


def sibling_ranks(tree: Tree) -> Tensor:
    """How many earlier siblings each node has, [n]: drafters put the likelier ones first."""
    return (tree.parents[:, None] == tree.parents).tril(-1).sum(dim=1)


def expected_tokens(conditional: list[list[float]], tree: Tree) -> float:
    """Expected tokens of a step over a tree, bonus included, for one branch's table."""
    ranks, depths, parents = (t.tolist() for t in (sibling_ranks(tree), tree.depths, tree.parents))
    stands = [1.0]
    for rank, depth, parent in list(zip(ranks, depths, parents, strict=True))[1:]:
        row = conditional[min(depth, len(conditional)) - 1]
        stands.append(stands[parent] * (row[rank] if rank < len(row) else 0.0))
    return sum(stands)


class Replay(Rule):
    """A rule whose pick after a tree is drawn from a profile."""

    def __init__(self, own: Rule, profile: AcceptanceProfile, *, level: int = 0) -> None:
        self.own = own
        self.profile = profile
        self.level = level
        self._bounds = _bounds(profile.table())

    @property
    def graphed(self) -> bool:
        """Where the rule's own can be."""
        return self.own.graphed

    def scores(self, logits: Tensor, positions: Tensor, *, seed: Tensor) -> Tensor:
        """The rule's own."""
        return self.own.scores(logits, positions, seed=seed)

    def choose(self, tree: Tree, logits: Tensor, positions: Tensor, *, seed: Tensor) -> Tensor:
        """Draw a child of every node, or the best token that is none of its children."""
        if len(tree) == 1:
            return self.pick(logits, positions, seed=seed)
        scores = self.scores(logits, positions, seed=seed)
        parents, tokens = tree.parents[1:], tree.tokens[1:]
        worst = torch.full((), -torch.inf, dtype=scores.dtype, device=scores.device)
        others = argmax(scores.index_put((parents, tokens), worst))
        drawn = uniform(seed, self.level, positions)[parents]
        low, high = self._intervals(tree)
        # Children have disjoint intervals, so one at most is hit; those that are not go nowhere.
        place = torch.where((low <= drawn) & (drawn < high), parents, len(tree))
        return torch.cat([others, others[:1]]).scatter(0, place, tokens)[:-1]

    def smaller(self) -> Rule:
        """What the profile says of the smaller model."""
        return self.profile.small.rule(self.own, level=self.level + 1)

    def _intervals(self, tree: Tree) -> tuple[Tensor, Tensor]:
        """Where each node but the root stands, of a draw from [0, 1). Two of [n - 1]."""
        if self._bounds.device != tree.tokens.device:
            self._bounds = self._bounds.to(tree.tokens.device)
        branches, depths, ends = self._bounds.shape
        ranks = sibling_ranks(tree)
        first = ((ranks == 0) | ~tree.mask).all(dim=1)
        branch = (tree.depths * first).max().clamp(max=branches - 1)
        depth = (tree.depths[1:] - 1).clamp(max=depths - 1)
        rank = ranks[1:].clamp(max=ends - 2)
        own = self._bounds[branch.expand_as(depth), depth]  # one number as an index is a sync
        low, high = (own.gather(1, (rank + i)[:, None])[:, 0] for i in (0, 1))
        return low, high


def uniform(seed: Tensor, level: int, positions: Tensor) -> Tensor:
    """Draw from [0, 1) by seed, level and position alone. seed: [1]; positions: [n] -> [n] float64.

    SplitMix64 (Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195) in int64, whose products
    wrap as the algorithm wants; only its shifts must be kept from copying the sign.
    """
    x = _mixed(seed * _signed(0x9E3779B97F4A7C15) + level)
    x = _mixed(x + positions * _signed(0x9E3779B97F4A7C15))
    return _shifted(x, 11).double() * 2.0**-53


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64)


def _bounds(table: list[list[list[float]]]) -> Tensor:
    """Where each rank's interval begins and ends, an empty one last. [branches, depths, ranks + 2].

    Shorter rows are filled with what ends them.
    """
    depths = max(len(branch) for branch in table)
    ranks = max(len(row) for branch in table for row in branch)
    filled = [
        [
            row + [0.0] * (ranks + 1 - len(row))
            for row in branch + branch[-1:] * (depths - len(branch))
        ]
        for branch in table
    ]
    ends = torch.tensor(filled, dtype=torch.float64).cumsum(dim=-1)
    return torch.cat([torch.zeros_like(ends[..., :1]), ends], dim=-1)
