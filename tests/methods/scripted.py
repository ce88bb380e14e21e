"""Drafters whose drafts are known beforehand, or are another's."""

from collections.abc import Collection, Sequence

from methods.drafter import Drafter, Mark, State, unmarked
from methods.tree import Tree


class Scripted(Drafter):
    """Proposes a chain of `depth` tokens from a script of the whole output, shifted by `error`."""

    def __init__(self, script: list[int], *, depth: int, error: int, vocab: int) -> None:
        self.script = script
        self.depth = depth
        self.error = error
        self.vocab = vocab

    @property
    def taps(self) -> tuple[int, ...]:
        return ()

    @property
    def widths(self) -> range:
        return range(1, self.depth + 2)

    def warm_up(self, features: int, *, unread: int) -> None:
        pass

    def expect(self, lengths: Collection[int]) -> None:
        pass

    def begin(self, state: State) -> None:
        pass

    def propose(self, state: State, mark: Mark = unmarked) -> Tree:
        known = len(state.tokens)
        drafts = [(t + self.error) % self.vocab for t in self.script[known : known + self.depth]]
        return Tree.chain([state.tokens[-1], *drafts])


class HandsOn(Drafter):
    """Is another drafter in all but `propose`, which looks at what that one proposes."""

    inner: Drafter

    @property
    def taps(self) -> tuple[int, ...]:
        return self.inner.taps

    @property
    def longest(self) -> int:
        return self.inner.longest

    @property
    def widths(self) -> Sequence[int]:
        return self.inner.widths

    def blank(self, n: int) -> Tree:
        return self.inner.blank(n)

    def warm_up(self, features: int, *, unread: int) -> None:
        self.inner.warm_up(features, unread=unread)

    def expect(self, lengths: Collection[int]) -> None:
        self.inner.expect(lengths)

    def begin(self, state: State) -> None:
        self.inner.begin(state)
