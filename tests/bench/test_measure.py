import pytest
import torch
from torch import Tensor

from bench.measure import _counting, draft_case, measure, random_tree, verify_cases
from methods.eagle2 import Eagle2
from methods.hierarchical import Hierarchical
from methods.recipe import Family, Parts
from methods.vanilla import Vanilla
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


def test_proposals_walk_along_the_text_and_start_over(parts: Parts) -> None:
    method = Eagle2(depth=4, top_k=3, nodes=12).method(parts)
    case = draft_case(method, TOKENS[:60], steps=3, stride=4)
    trees = [case.run() for _ in range(6)]
    roots = [int(t.tokens[0]) for t in trees]  # type: ignore[attr-defined]
    assert roots == [TOKENS[51], TOKENS[55], TOKENS[59]] * 2
    for first, again in zip(trees[:3], trees[3:], strict=True):
        assert torch.equal(first.tokens, again.tokens)  # type: ignore[attr-defined]


def test_a_random_tree_is_a_tree_of_that_many_nodes() -> None:
    tree = random_tree(100, VOCAB, seed=3, device=CPU)
    assert len(tree) == 100
    assert all(p < i for i, p in enumerate(tree.parents.tolist()))
    assert tree.mask[:, 0].all()
