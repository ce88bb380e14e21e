"""Drafters whose drafts are known beforehand."""

from methods.decode import Drafter, Mark, State, unmarked
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

    def begin(self, state: State) -> None:
        pass

    def propose(self, state: State, mark: Mark = unmarked) -> Tree:
        known = len(state.tokens)
        drafts = [(t + self.error) % self.vocab for t in self.script[known : known + self.depth]]
        return Tree.chain([state.tokens[-1], *drafts])
