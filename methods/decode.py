"""The one decode loop. A method is a target, a drafter and a rule; plain decoding drafts nothing.

Letters: P prompt tokens, n nodes of a tree, F features kept for the drafter.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from methods.drafter import Drafter, Mark, State, unmarked
from methods.fused import attends, commit, walk
from methods.graph import GRAPHS, Captured
from methods.prefill import FirstChunk, chunks, sent
from methods.transformer import Transformer, read_tree
from methods.tree import Tree
from methods.verify import Rule


class Method:
    """A target that reads what a drafter proposes, and a rule that decides what stands."""

    def __init__(self, target: Transformer, drafter: Drafter, rule: Rule, *, context: int) -> None:
        """Make caches for `context` decided tokens."""
        self.target = target
        self.drafter = drafter
        self.rule = rule
        self.context = context
        # The last step may decide a whole path beyond the limit before it is cut.
        self.kv = target.cache(context + 2 * drafter.max_nodes)
        self.features = torch.zeros(
            self.kv.capacity,
            len(drafter.taps) * target.shape.hidden_size,
            dtype=target.dtype,
            device=target.device,
        )
        self.cached: list[int] = []
        self._first = FirstChunk(self._read, self.kv)
        graphed = attends(self.kv.data)
        self._verify = Captured(
            self._verified, device=target.device, graphed=graphed and rule.graphed, fetched=0
        )
        self._commit = Captured(
            self._committed, device=target.device, graphed=graphed, borrows=True
        )

    def warm_up(self, *, unread: int = 0) -> None:
        """Capture every forward of a step as a graph, where there is a GPU; forget everything.

        unread: decided tokens that may ride along with a tree, as they do after `resume`.
        """
        with GRAPHS.warm_up():
            self.drafter.warm_up(self.features.shape[1], unread=unread)
            for n in self.drafter.widths:
                tree = self.drafter.blank(n)
                for behind in range(unread + 1):
                    self.kv.rewind(0)
                    known = torch.zeros(2 + behind, dtype=torch.int64)
                    path, features = self._verify(known, tree.tokens, tree.parents)
                    if self._moves(n):
                        self._commit(known, path, features)
        self.kv.rewind(0)
        self.cached = []

    def expect(self, lengths: Collection[int], *, drafting: bool = False) -> None:
        """Capture how what drafts reads prompts of so many tokens; forget everything.

        drafting: this method does, for another, so its target's own reads are among these.
        """
        self.kv.rewind(0)
        self.cached = []
        if drafting:
            self._first.expect(n - 1 for n in lengths)
        self.drafter.expect(lengths)

    def prefill(
        self,
        tokens: list[int],
        *,
        seed: int = 0,
        mark: Mark = unmarked,
        drafting: bool = False,
    ) -> State:
        """Forget everything and read a prompt, all but its newest token, and the drafter's too.

        drafting: as of `expect`.
        """
        self._require_room(tokens)
        self.kv.rewind(0)
        self.cached = []
        end = len(tokens) - 1
        if drafting:
            self._first(tokens[:end])
        for chunk in chunks(self.kv.length, end):
            self._read(sent(tokens[chunk], self.target.device))
            self.kv.advance(chunk.stop - chunk.start)
        self.cached = tokens[:end]
        mark("prefill")
        state = self._state(tokens, kept=len(tokens), seed=seed)
        self.drafter.begin(state)
        mark("draft_prefill")
        return state

    def resume(self, tokens: list[int], *, seed: int = 0, same: int = 0) -> State:
        """Go on from other tokens: keep the prefix that is cached, read nothing yet.

        What was decided meanwhile and is not cached rides along with the next step's tree.
        same: leading tokens that, as far as they are cached, need not be compared.
        """
        self._require_room(tokens)
        same = max(0, min(same, len(self.cached), len(tokens) - 1))
        kept = same + _shared(self.cached[same:], tokens[same:-1])
        self.kv.rewind(kept)
        del self.cached[kept:]
        return self._state(tokens, kept=kept, seed=seed)

    def step(self, state: State, mark: Mark = unmarked) -> State:
        """Draft, verify, commit: emit at least one token."""
        start = self.kv.length
        unread = state.tokens[start:-1]
        known = torch.tensor([start, state.seed, *unread])
        self.kv.reserve(len(unread) + self.drafter.max_nodes)
        tree = self.drafter.propose(state, mark)
        mark("draft")
        path, features = self._verify(known, tree.tokens, tree.parents)
        mark("verify")
        if self._moves(len(tree)):
            self._commit(known, path, features)
        # While the device works: a copy of a long context takes longer than the rest of this.
        tokens = list(state.tokens)
        self.cached += tokens[start:]
        count, *rest = self._verify.fetch().tolist()  # sync: what a step waits for
        mark("commit")
        new = rest[len(tree) :][:count]
        self.kv.advance(len(unread) + count)
        tokens += new
        self.cached += new[:-1]
        return State(
            tokens=tokens,
            kept=len(state.tokens),
            features=self.features[: self.kv.length],
            seed=state.seed,
            accepted=count - 1,
            drafted=len(tree) - 1,
        )

    def _read(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Read [n] tokens in order behind what is decided, and keep their features."""
        start, end = self.kv.length, self.kv.length + len(tokens)
        positions = torch.arange(start, end, device=self.target.device)
        read = self.target(tokens[None], positions, self.kv, taps=self.drafter.taps)
        self.kv.scratch = 0
        if self.features.shape[1]:
            self.features[start:end] = read.features[0]
        return ()

    def _verified(self, known: Tensor, tokens: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
        """Read u unread tokens and a tree of n nodes below them; decide what stands of the tree.

        known: [2 + u] int64, the decided length, the seed and the unread tokens. Gives the path
        (`methods.fused.walk`), [1 + 2n], and the features of all that was read, [u + n, F].
        """
        base, seed, unread = known[:1], known[1:2], known[2:]
        u = len(unread)
        given, above = tokens, parents
        if u > 0:  # else what is given is all there is to read: no kernel is spent on it
            chain = torch.arange(-1, u - 1, device=known.device)
            given, above = torch.cat([unread, tokens]), torch.cat([chain, parents + u])
        read, positions = read_tree(
            self.target, self.kv, base, given[None], above, taps=self.drafter.taps
        )
        logits = self.target.logits(read.hidden[0, u:])
        tree = Tree(tokens=tokens, parents=parents)
        picked = self.rule.choose(tree, logits, positions[u:] + 1, seed=seed)
        return walk(tokens, parents, picked), read.features[0]

    def _moves(self, n: int) -> bool:
        """Whether a step over n nodes has anything to move: a root alone stands in place."""
        return n > 1 or self.features.shape[1] > 0

    def _committed(self, known: Tensor, path: Tensor, features: Tensor) -> tuple[Tensor, ...]:
        """Move what stands to where it belongs. Arguments as `_verified` has and gives them."""
        n, u = len(path) // 2, len(known) - 2
        base, count, nodes = known[:1], path[:1], path[1 : 1 + n]
        if n > 1:
            commit(self.kv.data[:, :, 0], base + u if u else base, nodes, count)
        if self.features.shape[1]:
            # Rows behind the last that stands are written too, and overwritten by the next step.
            rows = base + torch.arange(u + n, device=path.device)
            chain = torch.arange(u, device=path.device)
            taken = torch.cat([chain, u + nodes]) if u else nodes
            self.features[rows] = features[taken]
        return ()

    def _state(self, tokens: list[int], *, kept: int, seed: int) -> State:
        return State(tokens=tokens, kept=kept, features=self.features[: self.kv.length], seed=seed)

    def _require_room(self, tokens: list[int]) -> None:
        if not 1 <= len(tokens) <= self.context:
            raise ValueError(f"a state must have 1 to {self.context} tokens, got {len(tokens)}")


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one generation gave. token_ids: new tokens, after the cut at stop or limit.

    accepted, drafted: drafts kept and proposed in each step, before the cut.
    """

    token_ids: list[int]
    stopped: bool
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)


def generate(
    method: Method,
    prompt: list[int],
    *,
    limit: int,
    stop: Callable[[list[int]], int | None],
    seed: int = 0,
    mark: Mark = unmarked,
) -> Output:
    """Decode until `limit` new tokens stand or `stop` cuts.

    stop: given all new tokens, to look at only, how many to keep once they hold a stop, else None.
    """
    state = method.prefill(prompt, seed=seed, mark=mark)
    accepted: list[int] = []
    drafted: list[int] = []
    new: list[int] = []
    while True:
        state = method.step(state, mark)
        accepted.append(state.accepted)
        drafted.append(state.drafted)
        new += state.tokens[len(prompt) + len(new) :]
        keep = stop(new if len(new) <= limit else new[:limit])
        mark("stop")
        if keep is not None or len(new) >= limit:
            return Output(
                token_ids=new[: limit if keep is None else keep],
                stopped=keep is not None,
                accepted=accepted,
                drafted=drafted,
            )


def _shared(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    if a == b[: len(a)]:
        return len(a)
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
