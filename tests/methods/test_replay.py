"""Replayed acceptance: a profile's tokens per step, whatever the weights."""

import statistics
from collections.abc import Sequence

import pytest
import torch

from bench.build import build
from bench.trace import Watched
from methods.decode import generate
from methods.eagle2 import Eagle2
from methods.fused import walk
from methods.hierarchical import Hierarchical
from methods.recipe import Family, Recipe
from methods.replay import (
    Acceptance,
    AcceptanceProfile,
    Conditional,
    Constant,
    Measured,
    Replay,
    constant_for,
    expected_tokens,
    sibling_ranks,
)
from methods.tree import Tree
from methods.vanilla import Vanilla
from methods.verify import Greedy
from tests.made_up import write_random_family
from tests.methods.parts import make_parts

# The root's children are 1, 2, 3; below 1 are 4, 5; below 2 is 6; below 4 is 7.
TREE = Tree(
    tokens=torch.tensor([50, 11, 12, 13, 21, 22, 23, 31]),
    parents=torch.tensor([-1, 0, 0, 0, 1, 1, 2, 4]),
)
SEED = torch.tensor([0])
ROWS = [[0.5, 0.2, 0.1], [0.6, 0.3]]


def conditional(rows: list[list[float]] = ROWS) -> Conditional:
    return Conditional(name="c", source="s", tau=None, small=Measured(), conditional=rows)


def constant(tau: float, small: AcceptanceProfile | None = None) -> Constant:
    return Constant(name="k", source="s", tau=tau, small=small or Measured())


def paths(profile: AcceptanceProfile, tree: Tree, count: int) -> list[tuple[int, ...]]:
    """Accepted nodes of independent steps."""
    rule = Replay(Greedy(), profile)
    logits = torch.randn(len(tree), 60, generator=torch.Generator().manual_seed(0))
    seen = []
    for seed in range(count):
        picked = rule.choose(tree, logits, 10 + tree.depths, seed=torch.tensor([seed]))
        length, *nodes = walk(tree.tokens, tree.parents, picked).tolist()
        seen.append(tuple(nodes[:length]))
    return seen


def test_ranks_count_earlier_siblings() -> None:
    assert sibling_ranks(TREE).tolist() == [0, 0, 1, 2, 0, 1, 0, 0]


def test_every_path_comes_as_often_as_the_profile_says() -> None:
    seen = paths(conditional(), TREE, 4000)
    share = {path: seen.count(path) / len(seen) for path in set(seen)}
    # By hand: depth 3 repeats the last row, and rank 2 has no entry there.
    expected = {
        (0,): 0.2,
        (0, 1): 0.5 * 0.1,
        (0, 2): 0.2 * 0.4,
        (0, 3): 0.1,
        (0, 1, 4): 0.5 * 0.6 * 0.4,
        (0, 1, 5): 0.5 * 0.3,
        (0, 2, 6): 0.2 * 0.6,
        (0, 1, 4, 7): 0.5 * 0.6 * 0.6,
    }
    assert sum(expected.values()) == pytest.approx(1)
    assert share.keys() == expected.keys()
    for path, probability in expected.items():
        assert share[path] == pytest.approx(probability, abs=4 * (probability / 4000) ** 0.5)


def test_expected_tokens_are_the_reach_of_every_node() -> None:
    by_hand = 1 + 0.8 + 0.5 * 0.9 + 0.2 * 0.6 + 0.5 * 0.6 * 0.6
    assert expected_tokens(ROWS, TREE) == pytest.approx(by_hand)


@pytest.mark.parametrize(("tau", "branch"), [(1.0, 3), (2.5, 6), (4.12, 6), (5.2, 7), (3.9, 3)])
def test_the_constant_solves_for_the_tokens_per_step(tau: float, branch: int) -> None:
    p = constant_for(tau, branch)
    assert sum(p**i for i in range(branch + 1)) == pytest.approx(tau)


def test_a_branch_too_short_for_tau_stands_whole() -> None:
    assert constant_for(4.12, 3) == 1


@pytest.mark.parametrize("length", [5, 7, 10])
def test_tau_is_met_over_branches_of_any_length(length: int) -> None:
    chain = Tree.chain(list(range(length)))
    lengths = [len(path) for path in paths(constant(3.5), chain, 3000)]
    reach = 4 * statistics.stdev(lengths) / len(lengths) ** 0.5
    assert statistics.fmean(lengths) == pytest.approx(3.5, abs=reach)


def test_the_bonus_is_the_targets_best_token_that_nobody_drafted() -> None:
    logits = torch.zeros(len(TREE), 60)
    logits[0, 11], logits[0, 40] = 9, 8  # a child, which the profile refuses, and another
    picked = Replay(Greedy(), conditional([[0.0]])).choose(TREE, logits, 3 + TREE.depths, seed=SEED)
    assert picked[0] == 40


def test_a_position_is_drawn_alike_in_every_tree() -> None:
    rule = Replay(Greedy(), conditional([[0.5]]))
    stands = []
    for length in (2, 4):
        chain = Tree.chain(list(range(length)))
        flat, seed = torch.zeros(length, 60), SEED + 5
        picked = [
            int(rule.choose(chain, flat, start + chain.depths, seed=seed)[0]) for start in range(40)
        ]
        stands.append([token == 1 for token in picked])
    assert stands[0] == stands[1]
    assert 5 < sum(stands[0]) < 35


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return write_random_family(tmp_path_factory.mktemp("family"), max_position_embeddings=1024)


def steps_of(
    family: Family, recipe: Recipe, profile: AcceptanceProfile, seeds: Sequence[int]
) -> tuple[list[int], Watched]:
    """Tokens of every step, and what was seen at every level."""
    watched = Watched(profile.rule(Greedy()))
    method = recipe.method(make_parts(family, rule=watched, context=400))
    outputs = [
        generate(method, [1, 2, 3, 4], limit=120, stop=lambda _: None, seed=seed) for seed in seeds
    ]
    return [1 + kept for output in outputs for kept in output.accepted], watched


def near(steps: list[int], tau: float) -> bool:
    return abs(statistics.fmean(steps) - tau) <= 4 * statistics.stdev(steps) / len(steps) ** 0.5


EAGLE = Eagle2(depth=6, top_k=4, nodes=24)


def test_a_tree_method_reaches_the_tokens_per_step_it_is_asked_for(family: Family) -> None:
    steps, watched = steps_of(family, EAGLE, constant(3.5), range(8))
    assert near(steps, 3.5)
    assert max(steps) <= 7
    assert watched.tau == pytest.approx(statistics.fmean(steps))


def test_hierarchical_reaches_both_of_its_own(family: Family) -> None:
    inner = Eagle2(depth=3, top_k=4, nodes=12)
    recipe = Hierarchical(min_draft=6, inner=inner)
    steps, watched = steps_of(family, recipe, constant(5.2, constant(2.5)), range(8))
    assert near(steps, 5.2)
    assert watched.inner is not None
    assert watched.inner.tau == pytest.approx(2.5, abs=0.25)


def test_plain_decoding_is_untouched(family: Family) -> None:
    parts = make_parts(family, rule=constant(4).rule(Greedy()))
    replayed, plain = (
        generate(Vanilla().method(p), [1, 2, 3], limit=20, stop=lambda _: None).token_ids
        for p in (parts, make_parts(family))
    )
    assert replayed == plain


def test_what_is_watched_is_the_share_of_children_that_stood() -> None:
    watched = Watched(Replay(Greedy(), conditional()))
    for seed in range(3000):
        watched.choose(TREE, torch.zeros(len(TREE), 60), 10 + TREE.depths, seed=SEED + seed)
    node = watched.profile("w", "s")
    # By hand: below node 2, which is one of two at its depth, there is no second child.
    expected = [[0.5, 0.2, 0.1], [0.6, 0.15 / 0.7, 0], [0.6, 0, 0]]
    for row, by_hand in zip(node["conditional"], expected, strict=True):
        assert row == pytest.approx(by_hand, abs=0.08)
    assert watched.tau == pytest.approx(expected_tokens(ROWS, TREE), abs=0.08)
    assert build(node, Acceptance, key="accept") == Conditional(  # type: ignore[type-abstract]
        name="w",
        source=f"s; {watched.tau:.3f} tokens per step over 3000 steps",
        tau=None,
        small=Measured(),
        conditional=node["conditional"],
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: conditional([]), "conditional must have a row"),
        (lambda: conditional([[0.7, 0.4]]), "sum to 1 at most"),
        (lambda: constant(0.5), "tau must be 1 to"),
    ],
)
def test_what_is_no_profile_is_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


def test_a_profile_of_one_model_leaves_the_smaller_one_measured() -> None:
    rule = constant(3).rule(Greedy())
    assert rule.smaller() == Greedy()
