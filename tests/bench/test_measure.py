from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor

from bench.measure import _counting, draft_case, measure, random_tree, verify_cases
from methods.decode import Method
from methods.drafter import Mark, State, unmarked
from methods.eagle2 import Eagle2
from methods.hierarchical import Hierarchical
from methods.recipe import Family, Parts
from methods.replay import Constant, Measured
from methods.tree import Tree
from methods.vanilla import Vanilla
from methods.verify import Greedy
from quant.block_float import BlockFloat, round_blocks
from quant.scheme import QuantLinear
from tests.family import VOCAB
from tests.methods.parts import make_parts

CPU = torch.device("cpu")
TOKENS = [i % VOCAB for i in range(120)]


@pytest.fixture(scope="module")
def parts(family: Family) -> Parts:
    return make_parts(family)


def test_every_width_context_and_batch_is_timed_as_often_as_asked(parts: Parts) -> None:
    cases = list(
        verify_cases(parts.target, TOKENS, context=50, widths=[1, 5, 70], batches=[1, 2], seed=0)
    )
    records = measure(cases, repeats=4, warmup=1, seed=0, device=CPU)
    assert [(r.n, r.batch) for r in records] == [(n, b) for b in (1, 2) for n in (1, 5, 70)]
    assert all(len(r.repeat_s) == 4 and min(r.repeat_s) > 0 for r in records)
    assert {r.context for r in records} == {50}


def test_costs_are_counted_from_the_model_and_its_cache(parts: Parts) -> None:
    case = next(verify_cases(parts.target, TOKENS, context=50, widths=[5], batches=[2], seed=0))
    assert case.record.weight_bytes == parts.target.weight_bytes
    layers, heads, dim, eight = 5, 2, 32, 8
    assert case.record.kv_bytes == 2 * 2 * layers * heads * dim * eight * 50
    assert case.record.flops == 2 * parts.target.flops(5, 50)


class ReadsDigits(QuantLinear):
    """A layer that is given its tokens in block floating point."""

    def forward(self, x: BlockFloat) -> Tensor:  # type: ignore[override]
        return torch.zeros(x.digits.shape[1], self.out_features)

    def dequantize(self) -> Tensor:
        return torch.zeros(self.out_features, self.in_features)


def test_tokens_that_are_given_as_digits_are_counted_as_tokens() -> None:
    layer = ReadsDigits(in_features=200, out_features=4)
    with _counting() as count:
        layer(round_blocks(torch.ones(3, 200)))
    assert count.flops == 2 * 3 * 200 * 4


def test_a_verification_leaves_the_cache_as_it_was(parts: Parts) -> None:
    one, other = verify_cases(parts.target, TOKENS, context=30, widths=[1, 9], batches=[1], seed=0)
    one.run()
    other.run()
    one.run()  # a cache that had grown would refuse the third read


@pytest.mark.parametrize(
    ("recipe", "forwards", "n"),
    [
        (Eagle2(depth=4, top_k=3, nodes=12), 4, 12),
        (Hierarchical(min_draft=6, inner=Vanilla()), 6, 7),
    ],
    ids=["eagle2", "chain"],
)
def test_a_proposal_counts_the_forwards_of_its_own_models(
    parts: Parts, recipe: Eagle2 | Hierarchical, forwards: int, n: int
) -> None:
    case = draft_case(recipe.method(parts), TOKENS[:60], steps=3, stride=4)
    assert (case.record.forwards, case.record.n) == (forwards, n)
    assert case.record.weight_bytes > 0


RECIPES = [
    pytest.param(Eagle2(depth=4, top_k=3, nodes=12), id="eagle2"),
    pytest.param(Hierarchical(min_draft=3, inner=Vanilla()), id="chain"),
    pytest.param(
        Hierarchical(min_draft=3, inner=Eagle2(depth=2, top_k=2, nodes=5)), id="hierarchical"
    ),
]


def accepting(family: Family) -> Parts:
    """Models whose drafts are accepted: tokens of theirs agree never."""
    profile = Constant(name="most", source="assumed", tau=3.5, small=Measured())
    return make_parts(family, rule=profile.rule(Greedy()))


def stepped(method: Method, prompt: list[int], *, steps: int) -> list[Tree]:
    """What each step of plain decoding by a method reads."""
    trees: list[Tree] = []
    propose = method.drafter.propose

    def noted(state: State, mark: Mark = unmarked) -> Tree:
        trees.append(propose(state, mark))
        return trees[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method.drafter, "propose", noted)
        state = method.prefill(prompt)
        for _ in range(steps):
            state = method.step(state)
    return trees


@pytest.mark.parametrize("recipe", RECIPES)
def test_proposals_are_those_of_decoding_and_start_over(
    parts: Parts, recipe: Eagle2 | Hierarchical
) -> None:
    asked = stepped(recipe.method(parts), TOKENS[:52], steps=3)
    case = draft_case(recipe.method(parts), TOKENS[:92], steps=3, stride=20)
    trees = [cast(Tree, case.run()) for _ in range(6)]
    for tree, other in zip(trees, [*asked, *asked], strict=True):
        assert torch.equal(tree.tokens, other.tokens)
        assert torch.equal(tree.parents, other.parents)


@pytest.mark.parametrize("recipe", RECIPES[1:])
def test_a_smaller_model_has_read_what_it_drafted(family: Family, recipe: Hierarchical) -> None:
    method = recipe.method(accepting(family))
    case = draft_case(method, TOKENS[:92], steps=3, stride=20)
    inner = method.drafter.method  # type: ignore[attr-defined]
    resume, unread = inner.resume, []

    def noted(tokens: list[int], *, seed: int = 0, same: int = 0) -> State:
        state: State = resume(tokens, seed=seed, same=same)
        unread.append(len(tokens) - 1 - inner.kv.length)
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner, "resume", noted)
        for _ in range(7):
            case.run()
    assert len(unread) == 7
    assert max(unread) <= 1  # after a whole draft was accepted, its last token


def test_forwards_are_those_of_the_proposals_that_are_timed(family: Family) -> None:
    whole = Constant(name="whole", source="assumed", tau=200, small=Measured())
    profile = replace(whole, small=whole)  # a whole draft stands, of whole paths
    recipe = Hierarchical(min_draft=3, inner=Eagle2(depth=2, top_k=2, nodes=5))
    method = recipe.method(make_parts(family, rule=profile.rule(Greedy())))
    case = draft_case(method, TOKENS[:100], steps=6, stride=9)
    with _counting() as count:
        for _ in range(6):
            case.run()
    assert case.record.forwards == round(count.forwards / 6)
    assert case.record.weight_bytes == round(count.weight_bytes / 6)


def test_a_walk_ends_where_its_text_does(family: Family) -> None:
    replaying = accepting(family)
    recipe = Hierarchical(min_draft=3, inner=Vanilla())
    method = recipe.method(replaying)
    state, steps = method.prefill(TOKENS[:52]), 0
    while len(state.tokens) <= 60:
        state = method.step(state)
        steps += 1
    assert 1 < steps < 9
    walked = stepped(recipe.method(replaying), TOKENS[:52], steps=steps)
    case = draft_case(recipe.method(replaying), TOKENS[:60], steps=9, stride=1)
    for tree in [*walked, *walked]:
        assert torch.equal(cast(Tree, case.run()).tokens, tree.tokens)


def test_a_random_tree_is_a_tree_of_that_many_nodes() -> None:
    tree = random_tree(100, VOCAB, seed=3, device=CPU)
    assert len(tree) == 100
    assert all(p < i for i, p in enumerate(tree.parents.tolist()))
    assert tree.mask[:, 0].all()
