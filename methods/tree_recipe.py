"""The settings that every tree of an EAGLE head has, whatever the head."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from methods.checkpoint import check_transformer
from methods.drafter import Drafter
from methods.grow import Head, TreeDrafter
from methods.head import kept_rows
from methods.recipe import Family, Parts, Recipe
from methods.transformer import Shape

MAX_DEPTH = 64
MAX_NODES = 1024


@dataclass(frozen=True, kw_only=True)
class TreeRecipe(Recipe, ABC):
    """depth: levels of the tree; top_k: nodes expanded a level, and children of each.

    nodes: size of the tree that the target reads, root included.
    """

    depth: int
    top_k: int
    nodes: int

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= MAX_DEPTH:
            raise ValueError(f"depth must be 1 to {MAX_DEPTH}, got {self.depth}")
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        most = min(MAX_NODES, 1 + self.top_k + (self.depth - 1) * self.top_k**2)
        if not 2 <= self.nodes <= most:
            raise ValueError(
                f"nodes must be 2 to {most} at depth={self.depth} and top_k={self.top_k}, "
                f"got {self.nodes}"
            )

    @abstractmethod
    def head_ids(self, family: Family, target: Shape) -> Tensor:
        """Check the head's folder against its target; give the target's id of each of its, [V]."""

    @abstractmethod
    def head(self, parts: Parts) -> Head:
        """Read the head."""

    def check(self, family: Family, *, draft_ids: Tensor | None = None) -> None:
        """The head must fit the target, and top_k its vocabulary, or what a list leaves of it."""
        own = self.head_ids(family, check_transformer(family.target))
        rows = kept_rows(own, draft_ids)
        vocab = len(own) if rows is None else len(rows)
        if self.top_k > vocab:
            cut = "" if rows is None else ", cut by draft_vocab,"
            raise ValueError(
                f"top_k must be within the head's vocabulary{cut} of {vocab}, got {self.top_k}"
            )

    def drafter(self, parts: Parts) -> Drafter:
        """Read the head and make its drafter."""
        return TreeDrafter(
            self.head(parts), depth=self.depth, top_k=self.top_k, nodes=self.nodes, parts=parts
        )
