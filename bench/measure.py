"""What one read of n tokens costs a target, and one proposal its drafter, at a given context.

The same forward, tree and cache as in decoding are timed: what is costed is what is run. Cases of
one context are repeated in a shuffled order, so that a drift of the machine meets all of them.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bench.energy import Counter, hold
from bench.record import Cost
from bench.timer import Timer
from methods.decode import Method
from methods.drafter import State
from methods.fused import attends
from methods.graph import GRAPHS, Captured
from methods.grow import Head
from methods.kv import KVCache
from methods.transformer import Transformer, read_tree
from methods.tree import Tree
from quant.block_float import BlockFloat
from quant.scheme import QuantLinear

STAGE = "case"
# Of each method's first case, before there were graphs, whose replay calls no module.
_COUNTS: "WeakKeyDictionary[Method, _Count]" = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to time again and again. record: what is known of it before it is timed."""

    record: Cost
    run: Callable[[], object]


def verify_cases(
    target: Transformer,
    tokens: Sequence[int],
    *,
    context: int,
    widths: Sequence[int],
    batches: Sequence[int],
    seed: int,
) -> Iterator[Case]:
    """Cases of reading a random tree of each width after the first `context` tokens."""
    for batch in batches:
        kv = target.cache(context + max(widths), batch=batch)
        rows = torch.tensor([list(tokens[:context])] * batch, device=target.device)
        target(rows, torch.arange(context, device=target.device), kv)
        kv.advance(context)
        for n in widths:
            # As in decoding, where plain steps send a root and drafters' trees lie on the device.
            place = target.device if n > 1 else torch.device("cpu")
            tree = random_tree(n, target.shape.vocab_size, seed=seed, device=place)
            yield _verify_case(target, kv, tree, batch)


def _verify_case(target: Transformer, kv: KVCache, tree: Tree, batch: int) -> Case:
    context, n = kv.length, len(tree)
    known = torch.tensor([context])

    def read(base: Tensor, tokens: Tensor, parents: Tensor) -> tuple[Tensor]:
        taken, _ = read_tree(target, kv, base, tokens.expand(batch, -1), parents)
        return (target.logits(taken.hidden),)

    # Graphs are for one sequence, as all methods decode; rows of a batch are launched one by one.
    captured = Captured(read, device=target.device, graphed=batch == 1 and attends(kv.data))
    with GRAPHS.warm_up():
        captured(known, tree.tokens, tree.parents)

    def run() -> Tensor:
        (logits,) = captured(known, tree.tokens, tree.parents)
        return logits

    record = Cost(
        what="verify",
        n=n,
        context=context,
        batch=batch,
        forwards=1,
        repeat_s=[],
        weight_bytes=target.weight_bytes,
        kv_bytes=kv.bytes_per_token * context,
        flops=batch * target.flops(n, context),
    )
    return Case(record=record, run=run)


def draft_case(method: Method, tokens: list[int], *, steps: int, stride: int) -> Case:
    """The case of one proposal, walking along a text as decoding does.

    The method decodes from `stride * (steps - 1)` tokens before the text's end, for `steps` steps
    or until it is as long as the text; every run proposes where the next step did, then over again:
    what a smaller model's own method does depends on the text, and what it must read on whether it
    drafted that itself. n and forwards are rounded means; forwards, weight_bytes and flops are
    those of the method's first case.
    """
    begin, end = tokens[: len(tokens) - stride * (steps - 1)], len(tokens)
    states = _walked(method, begin, steps=steps, end=end)
    if method not in _COUNTS:
        _COUNTS[method] = _counted(method, begin, states)
    count = _COUNTS[method]
    method.warm_up()
    method.prefill(begin)
    walk = cycle(states)

    def run() -> Tree:
        return method.drafter.propose(next(walk))

    nodes = sum(len(run()) for _ in states)
    record = Cost(
        what="draft",
        n=round(nodes / len(states)),
        context=len(tokens),
        batch=1,
        forwards=round(count.forwards / count.proposals),
        repeat_s=[],
        weight_bytes=round(count.weight_bytes / count.proposals),
        kv_bytes=0,
        flops=round(count.flops / count.proposals),
    )
    return Case(record=record, run=run)


def _walked(method: Method, begin: list[int], *, steps: int, end: int) -> list[State]:
    """Decode, and give the state ahead of every step."""
    state = method.prefill(begin)
    states: list[State] = []
    while len(states) < steps and len(state.tokens) <= end:
        states.append(state)
        state = method.step(state)
    kept = states[-1].features.clone()  # a warm-up writes over the method's own
    return [replace(s, features=kept[: len(s.features)]) for s in states]


def _counted(method: Method, begin: list[int], states: Sequence[State]) -> "_Count":
    """Count what proposals do, before graphs are captured: those call no module."""
    method.prefill(begin)
    with _counting() as count:
        for state in states:
            method.drafter.propose(state)
    count.proposals = len(states)
    return count


def measure(
    cases: Sequence[Case], *, repeats: int, warmup: int, seed: int, device: torch.device
) -> list[Cost]:
    """Time every case `repeats` times, in one shuffled order; give the records, as ordered."""
    timer = Timer(device)
    for case in cases:
        for _ in range(warmup):
            timer.start()
            case.run()
    order = [i for i in range(len(cases)) for _ in range(repeats)]
    random.Random(seed).shuffle(order)
    samples: list[list[float]] = [[] for _ in cases]
    for i in order:
        timer.start()
        cases[i].run()
        timer.mark(STAGE)
        samples[i] += timer.stop().stage_s[STAGE]
    return [
        replace(case.record, repeat_s=taken) for case, taken in zip(cases, samples, strict=True)
    ]


def with_energy(
    case: Case, taken: Cost, *, counter: Counter, hold_s: float, device: torch.device
) -> Cost:
    """Hold a case; add what one run of it took to its record.

    Not before everything is timed: it heats the device, and may cap its clock.
    """
    of = case.record
    assert (of.what, of.n, of.context, of.batch) == (
        taken.what,
        taken.n,
        taken.context,
        taken.batch,
    )
    return replace(taken, **asdict(hold(case.run, counter, seconds=hold_s, device=device)))


def random_tree(n: int, vocab_size: int, *, seed: int, device: torch.device) -> Tree:
    """Make a tree of n nodes, each below an earlier one taken at random."""
    generator = random.Random(f"{seed} {n}")
    tokens = [generator.randrange(vocab_size) for _ in range(n)]
    parents = [-1] + [generator.randrange(i) for i in range(1, n)]
    return Tree(
        tokens=torch.tensor(tokens, device=device), parents=torch.tensor(parents, device=device)
    )


@dataclass
class _Count:
    """What the models of a drafter did. flops: of linear layers; attention is left out."""

    proposals: int = 0
    forwards: int = 0
    weight_bytes: int = 0
    flops: int = 0


@contextmanager
def _counting() -> Iterator[_Count]:
    """Count the forwards of draft models and heads, and what their linear layers read and do."""
    count = _Count()

    def note(module: nn.Module, inputs: tuple[Tensor | BlockFloat, ...], _: object) -> None:
        if isinstance(module, Transformer | Head):
            count.forwards += 1
        elif isinstance(module, QuantLinear):
            x = inputs[0]
            if isinstance(x, BlockFloat):
                rows = x.digits.shape[1]
            else:
                rows = x.numel() // module.in_features
            count.weight_bytes += module.weight_bytes
            count.flops += 2 * rows * module.in_features * module.out_features

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        yield count
    finally:
        handle.remove()
