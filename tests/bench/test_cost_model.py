import pytest

from bench import cost_model
from bench.cost_model import timed_s
from bench.record import Cost


def cost(
    what: str,
    n: int,
    seconds: float = 1.0,
    *,
    context: int = 100,
    batch: int = 1,
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
    assert cost_model.proposal(costs, 5, 100, timed_s) == 0.3


def test_bytes_per_second_divides_what_was_read_by_the_median() -> None:
    assert cost_model.bytes_per_second(cost("draft", 4, 0.5)) == pytest.approx(200)
