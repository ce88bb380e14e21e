"""What drafts for a target, and what it is told of the text so far.

Letters: n nodes of a tree, F features kept for the drafter.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from methods.tree import Tree

# Told each stage's name as it ends: prefill, draft_prefill, then host (what the device waits for),
# draft, verify, commit and stop (the caller's own look at the new tokens) of every step.
Mark = Callable[[str], None]


def unmarked(stage: str) -> None:
    """Drop a mark: the clock of an outer method already runs."""


@dataclass(frozen=True, kw_only=True)
class State:
    """What is decided, as a drafter sees it.

    tokens: all of them; the newest is the root of the next tree, unread by the target.
    kept: how many leading tokens are as they were in the state before, or in the prompt that the
    drafter has begun with.
    features: [read, F], of tokens[:read]; read is len(tokens) - 1, or less after a rewind.
    accepted, drafted: drafts kept and proposed by the step that led here.
    """

    tokens: list[int]
    kept: int
    features: Tensor
    seed: int
    accepted: int = 0
    drafted: int = 0


class Drafter(ABC):
    """What proposes. It may scribble in caches of its own; it never touches the target's."""

    @property
    @abstractmethod
    def taps(self) -> tuple[int, ...]:
        """Streams of the target it wants as features (`Transformer.forward`)."""

    @property
    @abstractmethod
    def widths(self) -> Sequence[int]:
        """Sizes of the trees that it may propose, root included."""

    @property
    def max_nodes(self) -> int:
        """The largest tree it proposes, root included."""
        return max(self.widths)

    @property
    def longest(self) -> int:
        """Most tokens that a step may give: the longest path, its end's bonus for the root."""
        return self.max_nodes

    def blank(self, n: int) -> Tree:
        """A tree of n nodes that lies where a proposed one does, on the host or on the device."""
        return Tree.chain([0] * n)

    @abstractmethod
    def warm_up(self, features: int, *, unread: int) -> None:
        """Call what it captures in every shape and place of its inputs (methods.graph).

        features: F of a state. unread: as of `Method.warm_up`.
        """

    @abstractmethod
    def expect(self, lengths: Collection[int]) -> None:
        """Capture how it reads prompts of so many tokens. An earlier prompt's reads may be lost."""

    @abstractmethod
    def begin(self, state: State) -> None:
        """Read the prompt; nothing of an earlier one may be reused."""

    @abstractmethod
    def propose(self, state: State, mark: Mark = unmarked) -> Tree:
        """Give a tree whose root is state.tokens[-1].

        mark: told `host` wherever the device has waited for the host and waits no longer.
        """
