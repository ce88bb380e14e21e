"""Acceptance profiles from decoding that was watched: what stood, by depth and sibling rank."""

from collections import Counter
from typing import Any

from torch import Tensor

from methods.fused import walk
from methods.replay import sibling_ranks
from methods.tree import Tree
from methods.verify import Rule

DIGITS = 4  # of a probability in a yaml


class Watched(Rule):
    """A rule that counts which children of its trees stand.

    steps, tokens: of trees that drafted anything. tried: nodes with children that stood, by depth
    of the children. stood: children that stood, by their depth and rank. inner: of the smaller
    model, once there is one.
    """

    def __init__(self, own: Rule) -> None:
        self.own = own
        self.steps = 0
        self.tokens = 0
        self.tried: Counter[int] = Counter()
        self.stood: Counter[tuple[int, int]] = Counter()
        self.inner: Watched | None = None

    @property
    def graphed(self) -> bool:
        """What is counted is looked at on the host."""
        return False

    def scores(self, logits: Tensor, positions: Tensor, *, seed: Tensor) -> Tensor:
        """The rule's own."""
        return self.own.scores(logits, positions, seed=seed)

    def choose(self, tree: Tree, logits: Tensor, positions: Tensor, *, seed: Tensor) -> Tensor:
        """Pick as the rule does, and count."""
        picked = self.own.choose(tree, logits, positions, seed=seed)
        if len(tree) > 1:
            count, *nodes = walk(tree.tokens, tree.parents, picked).tolist()
            self._count(tree, nodes[:count])
        return picked

    def smaller(self) -> Rule:
        """Watch the smaller model's rule as well."""
        self.inner = Watched(self.own.smaller())
        return self.inner

    def _count(self, tree: Tree, path: list[int]) -> None:
        ranks, parents = sibling_ranks(tree).tolist(), set(tree.parents.tolist())
        self.steps += 1
        self.tokens += len(path)
        self.tried.update(depth for depth, node in enumerate(path, start=1) if node in parents)
        self.stood.update((depth, ranks[node]) for depth, node in enumerate(path) if depth)

    @property
    def tau(self) -> float:
        """Tokens per step that drafted, bonus included."""
        return self.tokens / self.steps

    def profile(self, name: str, source: str) -> dict[str, Any]:
        """Give what was counted as a node of conf/accept; ValueError where nothing was drafted."""
        if not self.steps:
            raise ValueError(f"{name}: a profile needs steps that drafted, got none")
        ranks = 1 + max((rank for _, rank in self.stood), default=0)
        small: dict[str, Any] = {"_target_": "methods.replay.Measured"}
        if self.inner is not None and self.inner.steps:
            small = self.inner.profile(f"{name}_small", source)
        return {
            "_target_": "methods.replay.Conditional",
            "name": name,
            "source": f"{source}; {self.tau:.3f} tokens per step over {self.steps} steps",
            # Replayed text is nobody's: its trees have other shapes, and so another tau.
            "tau": None,
            "conditional": [
                [round(self.stood[depth, rank] / tries, DIGITS) for rank in range(ranks)]
                for depth, tries in sorted(self.tried.items())
            ],
            "small": small,
        }
