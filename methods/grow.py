"""Grow a draft tree by best paths and keep its best nodes, as EAGLE-2 does for any EAGLE head.

EAGLE-2 (Li et al. 2024, arXiv 2406.16858, section 4): every level expands the `top_k` nodes of
highest cumulative probability, each by its `top_k` likeliest tokens; of all nodes seen, the best
`nodes - 1` are kept beside the root. A child never scores above its parent, so what is kept hangs
together.

An EAGLE head reads pairs: the target's feature of token p with the embedding of token p + 1, at
position p. Its output stands for the feature of token p + 1, and so drafts token p + 2.

A head may score fewer tokens than the target knows: EAGLE-3's was trained so, and FR-Spec (Zhao et
al. 2025, arXiv 2502.14856) keeps only frequent rows of any head's lm_head. Only those are drafted;
what stands is decided over the whole vocabulary all the same.

Letters: m pairs, K top_k, D hidden, F width of the target's features, V draft vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection

import torch
from torch import Tensor, nn

from methods.drafter import Drafter, Mark, State, unmarked
from methods.expansion import Expansion, Level
from methods.fused import attends, best, expand, prune
from methods.graph import GRAPHS, Captured
from methods.kv import KVCache
from methods.prefill import PREFILL_CHUNK, FirstChunk, chunks, sent
from methods.recipe import Parts
from methods.transformer import Shape
from methods.tree import Tree
from methods.window import Window, window


class Head(nn.Module, ABC):
    """An autoregressive head over a target's features."""

    embedding: Tensor
    kept: Tensor | None

    def __init__(
        self, shape: Shape, *, taps: tuple[int, ...], embedding: Tensor, kept: Tensor | None
    ) -> None:
        """taps: streams of the target that it reads. embedding: of every token, its own or not.

        kept: [V] int64, the target's id of each draft id; None where they are the same.
        """
        super().__init__()
        self.shape = shape
        self.taps = taps
        self.register_buffer("embedding", embedding)
        self.register_buffer("kept", kept)

    @abstractmethod
    def enter(self, features: Tensor) -> Tensor:
        """Turn the target's features into the head's hidden stream. [m, F] -> [m, D]."""

    @abstractmethod
    def layer(
        self,
        tokens: Tensor,
        hidden: Tensor,
        view: Window,
    ) -> Tensor:
        """Run the head's one layer. tokens: [m]; hidden: [m, D] -> [m, D]."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Score the next token. [m, D] -> [m, V]."""

    def forward(
        self,
        tokens: Tensor,
        hidden: Tensor,
        positions: Tensor,
        kv: KVCache,
        ancestors: Tensor | None,
        *,
        base: Tensor | None = None,
    ) -> Tensor:
        """Read pairs into scratch. tokens, positions: [m]; hidden: [m, D] -> [m, D].

        ancestors, base: as in `methods.window`.
        """
        view = window(kv, positions, ancestors, shared=self.shape.shared, base=base)
        output = self.layer(tokens, hidden, view)
        kv.extend(len(tokens))
        return output

    def cache(self, capacity: int) -> KVCache:
        """Make an empty cache for the head's one layer."""
        return KVCache(
            num_layers=1,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
            capacity=capacity,
            dtype=self.embedding.dtype,
            device=self.embedding.device,
            angles=self.shape.rope.table(
                capacity, self.shape.head_dim, self.embedding.dtype, self.embedding.device
            ),
        )


class TreeDrafter(Drafter):
    """Drafts trees with an EAGLE head that keeps up with what was decided."""

    def __init__(self, head: Head, *, depth: int, top_k: int, nodes: int, parts: Parts) -> None:
        self.head = head
        self.depth = depth
        self.top_k = top_k
        self.nodes = nodes
        self.device = parts.target.device
        self.kv = head.cache(parts.context + 2 * nodes + depth * top_k)
        # Pairs that steps leave unread: a whole path and its bonus, and one below another model.
        self._most_fresh = depth + 3
        self._entering = self.kv.data.new_zeros(
            min(PREFILL_CHUNK, self.kv.capacity),
            len(head.taps) * parts.target.shape.hidden_size,
        )
        self._first = FirstChunk(self._read_first, self.kv)
        graphed = attends(self.kv.data)
        self._draft = Captured(self._drafted, device=self.device, graphed=graphed)

    @property
    def taps(self) -> tuple[int, ...]:
        """What the head was trained on."""
        return self.head.taps

    @property
    def longest(self) -> int:
        """A leaf's path."""
        return self.depth + 1

    @property
    def widths(self) -> tuple[int, ...]:
        """The root alone where a feature lacks."""
        return (1, self.nodes)

    def expect(self, lengths: Collection[int]) -> None:
        """A prompt has a pair less than tokens, and the newest is no part of its read."""
        self._first.expect(n - 2 for n in lengths)

    def begin(self, state: State) -> None:
        """Read the prompt's pairs but the newest, which every proposal reads itself."""
        self.kv.rewind(0)
        pairs = state.tokens[1:-1]
        here = state.features[: min(len(pairs), len(self._entering))]
        self._entering[: len(here)] = here
        self._entering[len(here) :] = 0
        self._first(pairs)
        self._read_pairs(state, end=len(pairs))

    def warm_up(self, features: int, *, unread: int) -> None:
        """Draft behind every number of pairs that a step may leave unread."""
        # Below another model a step reads that one's bonus alone, and adds a token.
        most = self._most_fresh = self.depth + 2 + unread
        rows = torch.zeros(most, features, dtype=self.kv.data.dtype, device=self.device)
        for m in range(1, most + 1):
            self.kv.rewind(0)
            self._draft(torch.zeros(1 + m, dtype=torch.int64), rows[:m])

    def blank(self, n: int) -> Tree:
        """Trees are grown on the device; a root alone comes from the host."""
        tree = super().blank(n)
        if n == 1:
            return tree
        return Tree(tokens=tree.tokens.to(self.device), parents=tree.parents.to(self.device))

    def propose(self, state: State, mark: Mark = unmarked) -> Tree:
        """Read what was decided since, then draft behind it.

        Where the target has not read a decided token yet, its feature lacks and only the root is
        proposed: that step reads it.
        """
        last = len(state.tokens) - 1
        # A pair stands while both its tokens do; the newest is read anew for its output.
        self.kv.rewind(max(min(self.kv.length, state.kept - 1, last - 1), 0))
        if last == 0 or len(state.features) < last:
            mark("host")
            return Tree.chain(state.tokens[-1:])
        if last - self.kv.length > self._most_fresh:
            GRAPHS.missed += attends(self.kv.data)  # pairs in such numbers have no graph
            self._read_pairs(state, end=last - 1)
        start = self.kv.length
        self.kv.reserve(last - start + self.top_k * (self.depth - 1))
        fresh = torch.tensor([start, *state.tokens[start + 1 :]])
        mark("host")
        tokens, parents = self._draft(fresh, state.features[start:last])
        self.kv.advance(last - start)
        return Tree(tokens=tokens, parents=parents)

    def _read_pairs(self, state: State, *, end: int) -> None:
        """Commit the pairs from the cache's length to `end`."""
        for chunk in chunks(self.kv.length, end):
            tokens = state.tokens[chunk.start + 1 : chunk.stop + 1]
            self._read(sent(tokens, self.device), state.features[chunk])
            self.kv.advance(chunk.stop - chunk.start)

    def _read_first(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Read a prompt's first pairs, whose features are where a graph finds them."""
        return self._read(tokens, self._entering[: len(tokens)])

    def _read(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, ...]:
        """Read pairs in order behind the decided ones. tokens: [m]; features: [m, F]."""
        start = self.kv.length
        positions = torch.arange(start, start + len(tokens), device=self.device)
        self.head(tokens, self.head.enter(features), positions, self.kv, None)
        self.kv.scratch = 0
        return ()

    def _drafted(self, fresh: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Read m fresh pairs and grow a tree behind the last: its tokens and parents, each [n].

        fresh: [1 + m] int64, the decided pairs and the fresh ones' tokens; features: [m, F].
        """
        k, m = self.top_k, len(features)
        base, read = fresh[:1], fresh[1:]
        positions = base + torch.arange(m, device=self.device)
        entered = self.head.enter(features)
        output = self.head(read, entered, positions, self.kv, None, base=base)[-1:]
        # Paths are padded to one depth, so that all levels are read by one compiled kernel.
        level = Level.root(read, positions, entered, deeper=self.depth - 1)
        expansion = Expansion.empty(k + (self.depth - 1) * k**2, self.device)
        first = 0
        for step in range(self.depth):
            if step > 0:
                output = self.head(
                    level.tokens, level.hidden, level.positions, self.kv, level.ancestors, base=base
                )
            logprobs, ids = best(self.head.logits(output), k)
            level = expand(
                level,
                expansion,
                output,
                logprobs,
                ids,
                self.head.kept,
                first=first,
                column=m + step,
                slot=self.kv.scratch,
            )
            first += ids.numel()
        self.kv.scratch = 0
        return prune(read[-1:], expansion, keep=self.nodes - 1)
