from dataclasses import replace

import pytest

from bench import metrics
from bench.record import Generation
from tests.bench.made_campaign import generation

# Five steps that kept 1, 1, 3, 2 and 0 drafts; 12 tokens; 1 s of drafter's prefill and 5 s beyond.
CHAIN = [
    generation("a", [1, 2, 3, 4], 1.0, accepted=[1, 1], draft_prefill_s=0.5),
    generation("b", [1, 2, 3, 4], 2.0, accepted=[3], draft_prefill_s=0.25),
    generation("c", [1, 9, 3, 4], 2.0, accepted=[2, 0], draft_prefill_s=0.25),
]


def test_rate_charges_the_drafters_prefill() -> None:
    assert metrics.tokens_per_second(CHAIN) == pytest.approx(12 / 6)


def test_decode_rate_leaves_both_prefills_out() -> None:
    assert metrics.tokens_per_second(CHAIN, metrics.DECODE) == pytest.approx(12 / 5)


def test_request_rate_counts_both_prefills() -> None:
    assert metrics.tokens_per_second(CHAIN, metrics.REQUEST) == pytest.approx(12 / 7.5)


def test_rate_of_nothing_is_none() -> None:
    assert metrics.tokens_per_second([]) is None


def test_acceptance_length_counts_the_bonus_token() -> None:
    assert metrics.acceptance_length(CHAIN) == pytest.approx((7 + 5) / 5)


def test_acceptance_length_of_vanilla_is_one() -> None:
    assert metrics.acceptance_length([generation("a", [5, 6, 7], 1.0)]) == 1


def test_acceptance_length_is_counted_before_the_cut() -> None:
    cut = [generation("a", [1, 2], 1.0, accepted=[3])]  # two of four tokens are kept
    assert metrics.acceptance_length(cut) == 4


def test_acceptance_at_counts_steps_that_kept_at_least_i() -> None:
    assert metrics.acceptance_at(CHAIN) == pytest.approx([0.8, 0.4, 0.2])


def test_drafted_per_step() -> None:
    assert metrics.drafted_per_step(CHAIN) == 4


def test_stage_shares_are_of_the_charged_seconds() -> None:
    shares = metrics.stage_shares(CHAIN)
    assert list(shares.values()) == pytest.approx([1 / 6, 0, 1.875 / 6, 2.5 / 6, 0.625 / 6])


def test_host_gap_is_the_wall_time_that_no_stage_covers() -> None:
    assert metrics.host_gap_share(CHAIN) == pytest.approx(0.2)


def test_too_long_generations_are_not_averaged() -> None:
    long = Generation(prompt_id="z", turn=0, category="", status="too_long", prompt_tokens=9)
    assert metrics.finished([*CHAIN, long]) == CHAIN


def test_turns_of_a_prompt_are_summed_together() -> None:
    pairs = [
        (generation("a", [1, 2], 1.0), generation("a", [1, 2], 3.0)),
        (generation("a", [1], 0.5, turn=1), generation("a", [1], 2.0, turn=1)),
        (generation("b", [1], 1.0), generation("b", [1], 1.0)),
    ]
    assert metrics.pair_sums(pairs) == {"a": [3, 1.5, 3, 5.0], "b": [1, 1.0, 1, 1.0]}


def conversation(first: list[int], second: list[int]) -> list[Generation]:
    return [generation("a", first, 1.0), generation("a", second, 1.0, turn=1)]


def test_second_turn_after_an_equal_answer_is_compared() -> None:
    paired = metrics.pair(conversation([1, 2], [3]), conversation([1, 2], [4]), tokens_matter=True)
    assert (len(paired.pairs), paired.num_incomparable) == (2, 0)


def test_second_turn_after_a_different_answer_is_counted_and_left_out() -> None:
    paired = metrics.pair(conversation([1, 2], [3]), conversation([1, 9], [3]), tokens_matter=True)
    assert (len(paired.pairs), paired.num_incomparable) == (1, 1)


def test_replayed_tokens_do_not_decide_what_is_paired() -> None:
    paired = metrics.pair(conversation([1, 2], [3]), conversation([1, 9], [3]), tokens_matter=False)
    assert (len(paired.pairs), paired.num_incomparable) == (2, 0)


def test_prompt_that_vanilla_lacks_is_unpaired() -> None:
    paired = metrics.pair(CHAIN, [generation("a", [1, 2, 3, 4], 4.0)], tokens_matter=True)
    assert (len(paired.pairs), paired.num_unpaired) == (1, 2)


def test_repeats_are_paired_in_their_order() -> None:
    mine = [generation("a", [1], 1.0), generation("a", [1], 2.0)]
    other = [generation("a", [1], 3.0), generation("a", [1], 4.0)]
    paired = metrics.pair(mine, other, tokens_matter=True)
    assert paired.pairs == list(zip(mine, other, strict=True))


@pytest.mark.parametrize(
    ("gap_nats", "verdict", "counts"),
    [(0.15, "ties", (1, 1, 0)), (0.16, "DIFFERENT", (1, 0, 1)), (None, "unknown", (1, 0, 0))],
)
def test_verdict_at_the_tie_threshold(
    gap_nats: float | None, verdict: str, counts: tuple[int, int, int]
) -> None:
    vanilla = generation("a", [1, 2], 1.0)
    other = generation("b", [1, 7], 1.0, gap_nats=gap_nats)
    agreed = metrics.agreement([(vanilla, vanilla), (other, replace(vanilla, prompt_id="b"))], 0.15)
    assert agreed is not None
    assert (agreed.num_equal, agreed.num_ties, agreed.num_differences) == counts
    assert (agreed.share, agreed.verdict) == (0.5, verdict)


def test_equal_tokens_are_exact() -> None:
    vanilla = generation("a", [1, 2], 1.0)
    agreed = metrics.agreement([(vanilla, vanilla)], 0.0)
    assert agreed is not None
    assert agreed.verdict == "exact"


def test_a_gap_measured_between_other_tokens_is_unknown() -> None:
    vanilla = generation("a", [1, 5], 1.0)
    mine = generation("a", [1, 7], 1.0, gap_nats=0.1)  # between 7 and another vanilla's 2
    agreed = metrics.agreement([(mine, vanilla)], 0.15)
    assert agreed is not None
    assert (agreed.num_ties, agreed.num_unknown, agreed.verdict) == (0, 1, "unknown")
