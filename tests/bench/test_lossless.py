import sys

import pytest
import torch

from bench.lossless import ENDED, divergence
from methods.recipe import Family
from methods.transformer import Transformer
from methods.verify import Greedy, Sampled
from quant.dense import Dense
from tests.methods.parts import load

PROMPT = [3, 14, 15, 9, 2]


@pytest.fixture(scope="module")
def target(family: Family) -> Transformer:
    return load(family.target, Dense())


def next_logits(target: Transformer, tokens: list[int]) -> torch.Tensor:
    """Logits after the last token, by one read of all of them."""
    whole = torch.tensor([tokens])
    read = target(whole, torch.arange(len(tokens)), target.cache(len(tokens)))
    return target.logits(read.hidden[0, -1])


def test_equal_answers_do_not_diverge(target: Transformer) -> None:
    assert divergence(target, PROMPT, [1, 2], [1, 2], rule=Greedy(), seed=0) is None


def test_the_gap_is_the_targets_own_at_the_first_difference(target: Transformer) -> None:
    found = divergence(target, PROMPT, [7, 8, 20, 5], [7, 8, 30, 6], rule=Greedy(), seed=0)
    logits = next_logits(target, [*PROMPT, 7, 8])
    assert found == {
        "index": 2,
        "token": 20,
        "vanilla_token": 30,
        "gap_nats": pytest.approx(abs(float(logits[20] - logits[30])), rel=1e-5),
    }


def test_a_sampled_gap_has_the_noise_that_both_arms_drew(target: Transformer) -> None:
    rule = Sampled(temperature=2.0)
    found = divergence(target, PROMPT, [20], [30], rule=rule, seed=4)
    logits = next_logits(target, PROMPT)[None]
    scores = rule.scores(logits, torch.tensor([len(PROMPT)]), seed=4)[0]
    assert found is not None
    assert found["gap_nats"] == pytest.approx(abs(float(scores[20] - scores[30])), rel=1e-5)
    assert found != divergence(target, PROMPT, [20], [30], rule=rule, seed=5)


@pytest.mark.parametrize(
    ("mine", "vanilla", "pair"), [([1], [1, 2], (ENDED, 2)), ([1, 2], [1], (2, ENDED))]
)
def test_an_answer_that_ends_early_is_no_tie(
    target: Transformer, mine: list[int], vanilla: list[int], pair: tuple[int, int]
) -> None:
    found = divergence(target, PROMPT, mine, vanilla, rule=Greedy(), seed=0)
    assert found is not None
    assert (found["token"], found["vanilla_token"]) == pair
    assert (found["index"], found["gap_nats"]) == (1, sys.float_info.max)


def test_a_prefix_of_several_chunks_is_read_whole(
    target: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = divergence(target, PROMPT, [20], [30], rule=Greedy(), seed=0)
    monkeypatch.setattr("bench.lossless.PREFILL_CHUNK", 2)
    chunked = divergence(target, PROMPT, [20], [30], rule=Greedy(), seed=0)
    assert whole is not None
    assert chunked is not None
    assert chunked["gap_nats"] == pytest.approx(whole["gap_nats"])
