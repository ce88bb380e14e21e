import pytest
import torch
from scipy.stats import chisquare

from methods.fused import walk
from methods.tree import Tree
from methods.verify import Greedy, Sampled

SEED = torch.tensor([0])


def make(tokens: list[int], parents: list[int]) -> Tree:
    return Tree(tokens=torch.tensor(tokens), parents=torch.tensor(parents))


def accepted(tree: Tree, *picked: int) -> tuple[list[int], list[int]]:
    """The nodes that stand, and the tokens that they emit."""
    count, *rest = walk(tree.tokens, tree.parents, torch.tensor(picked)).tolist()
    return rest[: len(tree)][:count], rest[len(tree) :][:count]


def test_the_longest_right_path_stands() -> None:
    #        0:7
    #    1:8      2:9
    #  3:10      4:11  5:12
    tree = make([7, 8, 9, 10, 11, 12], [-1, 0, 0, 1, 2, 2])
    assert accepted(tree, 9, 10, 12, 0, 0, 42) == ([0, 2, 5], [9, 12, 42])


def test_a_right_token_below_a_wrong_one_does_not_stand() -> None:
    tree = make([7, 8, 9], [-1, 0, 1])
    assert accepted(tree, 5, 9, 6) == ([0], [5])


def test_a_root_alone_gives_the_bonus() -> None:
    assert accepted(Tree.chain([7]), 3) == ([0], [3])


def test_the_root_is_decided_whatever_the_last_node_picked() -> None:
    # parents[0] is -1, which indexes the last node: it must not veto the root.
    tree = make([7, 8], [-1, 0])
    assert accepted(tree, 8, 7) == ([0, 1], [8, 7])


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 0.0]])
    assert Greedy().pick(logits, torch.tensor([5, 6]), seed=SEED).tolist() == [1, 0]


def test_nodes_at_one_position_share_their_noise() -> None:
    logits = torch.zeros(3, 50)
    tokens = Sampled(temperature=1.0).pick(logits, torch.tensor([4, 5, 4]), seed=SEED + 3).tolist()
    assert tokens[0] == tokens[2]
    assert tokens[0] != tokens[1]


def test_noise_depends_on_the_seed() -> None:
    logits = torch.zeros(1, 10_000)
    rule = Sampled(temperature=1.0)
    position = torch.tensor([4])
    assert rule.pick(logits, position, seed=SEED + 1) != rule.pick(logits, position, seed=SEED)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    draws = 4000
    tokens = Sampled(temperature=temperature).pick(
        logits.expand(draws, -1), torch.arange(draws), seed=SEED + 11
    )
    counts = tokens.bincount(minlength=5).double()
    expected = (logits.double() / temperature).softmax(-1) * draws
    assert chisquare(counts.numpy(), expected.numpy()).pvalue > 0.01


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_must_be_above_zero(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0"):
        Sampled(temperature=temperature)
