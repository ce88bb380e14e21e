"""Plain decoding: the tree is its root."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from methods.drafter import Drafter, Mark, State, unmarked
from methods.recipe import Family, Parts, Recipe
from methods.tree import Tree


class VanillaDrafter(Drafter):
    """Proposes nothing, so every step emits the target's own token."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Needs no features."""
        return ()

    @property
    def widths(self) -> tuple[int, ...]:
        """The root alone."""
        return (1,)

    def warm_up(self, features: int, *, unread: int) -> None:
        """Runs nothing."""

    def expect(self, lengths: Collection[int]) -> None:
        """Reads nothing."""

    def begin(self, state: State) -> None:
        """Read nothing."""

    def propose(self, state: State, mark: Mark = unmarked) -> Tree:
        """Give the root."""
        tree = Tree.chain(state.tokens[-1:])
        mark("host")
        return tree


@dataclass(frozen=True, kw_only=True)
class Vanilla(Recipe):
    """No settings."""

    def folders(self, family: Family) -> list[Path]:
        """The target alone."""
        return []

    def check(self, family: Family, *, draft_ids: Tensor | None = None) -> None:
        """Fits every family."""

    def drafter(self, parts: Parts) -> Drafter:
        """Make a drafter that drafts nothing."""
        return VanillaDrafter()
