import pytest

from bench import cost_model
from bench.cost_model import held_j, timed_s
from bench.record import Cost


def cost(
    what: str,
    n: int,
    seconds: float = 1.0,
    *,
    context: int = 100,
    batch: int = 1,
    energy_mj: float | None = None,
) -> Cost:
    return Cost(
        what=what,
        n=n,
        context=context,
        batch=batch,
        forwards=2 if what == "draft" else 1,
        repeat_s=[seconds, seconds * 2, seconds / 2],
        weight_bytes=90,
        kv_bytes=10,
        flops=0,
        energy_mj=energy_mj,
    )


def test_cost_model_divides_tokens_by_the_cost_of_a_round() -> None:
    speedup = cost_model.predicted_speedup(acceptance_length=2.4, draft_ratio=0.6, verify_ratio=1.4)
    assert speedup == pytest.approx(1.2)


def test_verification_lies_on_a_line_between_measured_n() -> None:
    costs = [cost("verify", 1, 1.0), cost("verify", 4, 1.6)]
    assert cost_model.reading(costs, 2, 100, timed_s) == pytest.approx(1.2)


def test_verification_beyond_the_last_measured_n_is_none() -> None:
    assert cost_model.reading([cost("verify", 1, 1.0)], 2, 100, timed_s) is None


def test_costs_come_from_the_nearest_context_at_batch_1() -> None:
    costs = [
        cost("verify", 1, 1.0, context=64),
        cost("verify", 1, 2.0, context=512),
        cost("verify", 1, 9.0, context=400, batch=8),
    ]
    assert cost_model.reading(costs, 1, 400, timed_s) == 2.0


def test_draft_cost_comes_from_the_nearest_tree_size() -> None:
    costs = [cost("draft", 4, 0.3), cost("draft", 16, 0.9)]
    mean = (0.3 + 0.6 + 0.15) / 3  # their states differ, and a round takes what all take together
    assert cost_model.proposal(costs, 5, 100, timed_s) == pytest.approx(mean)


def test_bytes_per_second_divides_what_was_read_by_the_median() -> None:
    assert cost_model.bytes_per_second(cost("draft", 4, 0.5)) == pytest.approx(200)


def test_energy_lies_on_a_line_between_held_n_at_the_nearest_context() -> None:
    costs = [
        cost("verify", 1, context=64, energy_mj=1000),
        cost("verify", 61, context=64, energy_mj=2000),
        cost("verify", 1, context=512, energy_mj=6000),
        cost("verify", 61, context=512, energy_mj=13500),
        cost("verify", 49, context=500, batch=8, energy_mj=99000),
    ]
    assert cost_model.reading(costs, 49, 500, held_j) == pytest.approx(12.0)  # 6 + 0.8 * 7.5
    assert cost_model.reading(costs, 16, 70, held_j) == pytest.approx(1.25)
    assert cost_model.reading(costs, 1, 500, held_j) == 6.0
    assert cost_model.reading(costs, 62, 500, held_j) is None


def test_energy_passes_over_what_was_only_timed() -> None:
    costs = [
        cost("verify", 1, context=100),  # nearer, and never held
        cost("verify", 5, context=100),
        cost("verify", 1, context=300),
        cost("verify", 5, context=300, energy_mj=4000),
        cost("verify", 9, context=300),
        cost("verify", 13, context=300, energy_mj=8000),
    ]
    found = [cost_model.reading(costs, n, 100, held_j) for n in (1, 4, 5, 9, 13, 14)]
    assert found == [None, None, 4.0, 6.0, 8.0, None]
    assert cost_model.reading(costs, 9, 300, timed_s) == 1.0


def test_energy_of_a_proposal_comes_from_the_nearest_held_tree_size() -> None:
    costs = [cost("draft", 5), cost("draft", 16, energy_mj=900), cost("draft", 60, energy_mj=1800)]
    assert cost_model.proposal(costs, 5, 100, held_j) == 0.9
    assert cost_model.proposal(costs[:1], 5, 100, held_j) is None


def test_energy_of_one_read_that_was_held_twice_is_the_middle() -> None:
    costs = [cost("verify", 1, energy_mj=5000), cost("verify", 1, energy_mj=6000)]
    assert cost_model.reading(costs, 1, 100, held_j) == 5.5


def test_a_token_takes_its_share_of_a_rounds_energy() -> None:
    token_j = cost_model.joules_per_token(acceptance_length=4.1, proposal_j=1.12, reading_j=12.0)
    assert token_j == pytest.approx(3.2)
