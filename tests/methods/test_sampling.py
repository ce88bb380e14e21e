"""Sampled speculation against the target's own distribution, computed in closed form."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from methods.decode import generate
from methods.eagle2 import Eagle2
from methods.eagle3 import Eagle3
from methods.hierarchical import Hierarchical
from methods.recipe import Family, Parts, Recipe
from methods.vanilla import Vanilla
from methods.verify import Sampled
from tests.family import write_family
from tests.methods.parts import make_parts

VOCAB = 12
PROMPT = [0, 5, 7, 3]
DRAWS = 500
TREE = Eagle2(depth=2, top_k=4, nodes=12)
RECIPES: dict[str, Recipe] = {
    "vanilla": Vanilla(),
    "tree": TREE,
    "eagle3": Eagle3(depth=2, top_k=4, nodes=12),
    "chain": Hierarchical(min_draft=2, inner=Vanilla()),
    "hierarchical": Hierarchical(min_draft=2, inner=TREE),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    family: Family = write_family(tmp_path_factory.mktemp("small"), vocab_size=VOCAB)
    return make_parts(family, rule=Sampled(temperature=1.0), context=24)


def next_probs(parts: Parts, rows: Tensor) -> Tensor:
    """The target's distribution after each row. rows: [B, n] -> [B, V]."""
    n = rows.shape[1]
    read = parts.target(rows, torch.arange(n), parts.target.cache(n, batch=len(rows)))
    return parts.target.logits(read.hidden[:, -1]).softmax(-1)


def pair_probs(parts: Parts) -> Tensor:
    """Probability of each (first, second) new token. [V * V]."""
    first = next_probs(parts, torch.tensor([PROMPT]))[0]
    rows = torch.tensor([[*PROMPT, t] for t in range(VOCAB)])
    return (first[:, None] * next_probs(parts, rows)).flatten()


@pytest.mark.parametrize("name", ["tree", "chain", "hierarchical"])
def test_the_first_two_tokens_are_distributed_as_the_targets_own(parts: Parts, name: str) -> None:
    method = RECIPES[name].method(parts)
    counts = np.zeros(VOCAB * VOCAB)
    accepted = 0
    for seed in range(DRAWS):
        output = generate(method, PROMPT, limit=2, stop=lambda new: None, seed=seed)
        first, second = output.token_ids
        counts[first * VOCAB + second] += 1
        accepted += sum(output.accepted)
    expected = pair_probs(parts).numpy() * DRAWS
    common = expected >= 5  # the chi-square needs filled cells; the rare ones are pooled
    observed = np.append(counts[common], counts[~common].sum())
    predicted = np.append(expected[common], expected[~common].sum())
    assert chisquare(observed, predicted * observed.sum() / predicted.sum()).pvalue > 0.01
    assert accepted > DRAWS // 10


@pytest.mark.parametrize("name", RECIPES)
def test_with_one_seed_every_method_draws_the_same_text(parts: Parts, name: str) -> None:
    for seed in range(5):
        plain = generate(
            Vanilla().method(parts), PROMPT, limit=18, stop=lambda new: None, seed=seed
        )
        output = generate(
            RECIPES[name].method(parts), PROMPT, limit=18, stop=lambda new: None, seed=seed
        )
        assert output.token_ids == plain.token_ids
