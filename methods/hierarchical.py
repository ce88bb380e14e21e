"""A smaller model, decoding by a method of its own, drafts a sequence for the target.

HierSpec (arXiv 2505.22179, section 4): the inner method drafts EAGLE trees for the smaller model,
whose accepted tokens and bonus are collected until at least `min_draft` stand; the target reads
them as a sequence. With plain decoding inside, this is the draft-model speculation of Leviathan et
al. (2023, arXiv 2211.17192), "SP" in the paper: one token per inner step, exactly `min_draft` long.

After a rejection the inner method resumes at the corrected token with all features of what
stands; after full acceptance, the last draft and the bonus are unread and ride along with its
next step. Both cases thus have the right embeddings and positions by construction.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from methods.checkpoint import check_transformer
from methods.decode import Method
from methods.drafter import Drafter, Mark, State, unmarked
from methods.recipe import Family, Parts, Recipe
from methods.tree import Tree

MAX_DRAFT = 256


class HierarchicalDrafter(Drafter):
    """Drafts with a whole method over a smaller model."""

    def __init__(self, method: Method, *, min_draft: int) -> None:
        self.method = method
        self.min_draft = min_draft

    @property
    def taps(self) -> tuple[int, ...]:
        """Needs no features of the target."""
        return ()

    @property
    def widths(self) -> range:
        """The root, what is needed, and the rest of the inner step that reached it."""
        return range(1 + self.min_draft, 1 + self.min_draft + self.method.drafter.longest)

    def warm_up(self, features: int, *, unread: int) -> None:
        """The smaller model's own; after full acceptance its last draft rides along as well."""
        self.method.warm_up(unread=unread + 1)

    def expect(self, lengths: Collection[int]) -> None:
        """The smaller model reads what the target does."""
        self.method.expect(lengths, drafting=True)

    def begin(self, state: State) -> None:
        """Let the smaller model and its drafter read the prompt."""
        self.method.prefill(state.tokens, seed=state.seed, drafting=True)

    def propose(self, state: State, mark: Mark = unmarked) -> Tree:
        """Collect inner steps into a chain."""
        root = len(state.tokens) - 1
        inner = self.method.resume(state.tokens, seed=state.seed, same=state.kept)
        while len(inner.tokens) <= root + self.min_draft:
            inner = self.method.step(
                inner, lambda stage: mark("host" if stage == "host" else "draft")
            )
        tree = Tree.chain(inner.tokens[root:])
        mark("host")
        return tree


@dataclass(frozen=True, kw_only=True)
class Hierarchical(Recipe):
    """min_draft: tokens that must stand in the smaller model before the target reads them.

    inner: the method that the smaller model decodes by.
    """

    min_draft: int
    inner: Recipe

    def __post_init__(self) -> None:
        if not 1 <= self.min_draft <= MAX_DRAFT:
            raise ValueError(f"min_draft must be 1 to {MAX_DRAFT}, got {self.min_draft}")

    def folders(self, family: Family) -> list[Path]:
        """The smaller model, and what its own method reads."""
        small = family.smaller()
        return [small.target, *self.inner.folders(small)]

    def check(self, family: Family, *, draft_ids: Tensor | None = None) -> None:
        """The smaller model must speak the target's vocabulary and reach its positions."""
        small = family.smaller()
        own, drafts = check_transformer(family.target), check_transformer(small.target)
        if drafts.vocab_size != own.vocab_size:
            raise ValueError(
                f"{small.target}: vocab_size must be the target's {own.vocab_size}, "
                f"got {drafts.vocab_size}"
            )
        if drafts.max_positions < own.max_positions:
            raise ValueError(
                f"{small.target}: max_position_embeddings must reach the target's "
                f"{own.max_positions}, got {drafts.max_positions}"
            )
        if draft_ids is not None and not self.inner.folders(small):
            raise ValueError(
                "draft_vocab must be null where no draft head drafts, got a list of "
                f"{len(draft_ids)} tokens for a smaller model that decodes plainly"
            )
        self.inner.check(small, draft_ids=draft_ids)

    def drafter(self, parts: Parts) -> Drafter:
        """Load the smaller model and make its method, with room to run ahead."""
        smaller = parts.smaller(ahead=2 * MAX_DRAFT)
        return HierarchicalDrafter(self.inner.method(smaller), min_draft=self.min_draft)
