from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.record import Status
from bench.results import load
from bench.rows import CellRow
from bench.stats import Bootstrap, cell_rows, compatibility, rate, speedup
from tests.bench.made_campaign import CELL, cost, generation, pair_of_cells, write_cell

BOOTSTRAP = Bootstrap(samples=2000, confidence=0.95, seed=0)


def rows(root: Path) -> dict[str, CellRow]:
    return {r.cell: r for r in cell_rows(load(root), BOOTSTRAP)}


def test_interval_of_two_prompts_spans_both() -> None:
    # Resamples are aa, ab, bb with odds 1:2:1, so the outer 2.5% are aa and bb.
    interval = BOOTSTRAP.over_prompts({"a": [10.0, 10.0], "b": [30.0, 10.0]}, rate)
    assert (interval.low, interval.value, interval.high) == (1.0, 2.0, 3.0)


def test_narrow_interval_of_two_prompts_is_their_pool() -> None:
    narrow = Bootstrap(samples=2000, confidence=0.3, seed=0)
    interval = narrow.over_prompts({"a": [10.0, 10.0], "b": [30.0, 10.0]}, rate)
    assert (interval.low, interval.high) == (2.0, 2.0)


def test_both_arms_of_a_prompt_are_drawn_together() -> None:
    # The prompts differ tenfold in speed but not in ratio: pairing leaves no spread.
    sums = {"a": [10.0, 1.0, 10.0, 2.0], "b": [10.0, 10.0, 10.0, 20.0]}
    interval = BOOTSTRAP.over_prompts(sums, speedup)
    assert (interval.low, interval.high) == pytest.approx((2.0, 2.0))


def test_single_prompt_has_no_interval() -> None:
    interval = BOOTSTRAP.over_prompts({"a": [10.0, 5.0]}, rate)
    assert (interval.value, interval.low, interval.high) == (2.0, None, None)


def test_no_prompt_has_no_value() -> None:
    assert BOOTSTRAP.over_prompts({}, rate).value is None


def test_same_seed_gives_the_same_interval() -> None:
    sums = {str(i): [float(i), 10.0] for i in range(1, 30)}
    assert BOOTSTRAP.over_prompts(sums, rate) == BOOTSTRAP.over_prompts(sums, rate)


def test_ratio_of_constant_timings_has_no_spread() -> None:
    interval = BOOTSTRAP.ratio_of_medians([3.0, 3.0, 3.0], [2.0, 2.0])
    assert (interval.low, interval.value, interval.high) == (1.5, 1.5, 1.5)


@pytest.mark.parametrize(("samples", "confidence"), [(99, 0.95), (2000, 1.0), (2000, 0.0)])
def test_useless_settings_are_refused(samples: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="must"):
        Bootstrap(samples=samples, confidence=confidence, seed=0)


def test_row_of_a_method_beside_vanilla(tmp_path: Path) -> None:
    row = rows(pair_of_cells(tmp_path))["dense-chain"]
    assert (row.num_prompts, row.num_tokens, row.num_steps) == (3, 12, 5)
    assert (row.tokens_per_s, row.speedup) == pytest.approx((2.0, 2.0))
    assert (row.speedup_decode, row.speedup_request) == pytest.approx((2.4, 1.8))
    assert row.acceptance_length == pytest.approx(2.4)
    assert row.agreement == pytest.approx(2 / 3)
    assert (row.lossless, row.num_ties, row.num_differences) == ("ties", 1, 0)


def test_interval_spans_the_slowest_and_the_fastest_prompt(tmp_path: Path) -> None:
    # Ratios of the prompts: 4 / 1.5 for a, 4 / 2.25 for b and c. 8 of 27 resamples hold no a,
    # 1 of 27 (3.7%, more than the outer 2.5%) holds nothing else.
    row = rows(pair_of_cells(tmp_path))["dense-chain"]
    assert (row.speedup_low, row.speedup_high) == pytest.approx((4 / 2.25, 4 / 1.5))


def test_vanilla_is_its_own_baseline(tmp_path: Path) -> None:
    row = rows(pair_of_cells(tmp_path))["dense-vanilla"]
    assert (row.speedup_low, row.speedup, row.speedup_high) == (1.0, 1.0, 1.0)
    assert (row.acceptance_length, row.agreement, row.lossless) == (1.0, None, "-")


def test_method_without_vanilla_has_a_rate_and_a_note(tmp_path: Path) -> None:
    other = replace(CELL, method="chain", task="mt_bench")
    write_cell(tmp_path / "alone", other, [generation("a", [1, 2], 1.0, accepted=[1])])
    row = rows(pair_of_cells(tmp_path))["alone"]
    assert (row.tokens_per_s, row.speedup) == (2.0, None)
    assert "no finished vanilla" in row.reason


@pytest.mark.parametrize("field", ["scheme", "lm_head", "dtype", "weights", "model", "device"])
def test_vanilla_of_another_target_is_no_baseline(tmp_path: Path, field: str) -> None:
    changed: dict[str, Any] = {field: "other"}
    other = replace(CELL, method="chain", **changed)
    write_cell(tmp_path / "other", other, [generation("a", [1, 2], 1.0, accepted=[1])])
    assert rows(pair_of_cells(tmp_path))["other"].speedup is None


def test_vanilla_on_another_gpu_is_no_baseline(tmp_path: Path) -> None:
    context = {"schema": 1, "device": {"type": "cuda", "name": "Another"}}
    cell = replace(CELL, method="eagle2")
    write_cell(tmp_path / "far", cell, [generation("a", [1], 1.0)], context=context)
    assert rows(pair_of_cells(tmp_path))["far"].speedup is None


def test_failed_cell_is_a_row_with_its_reason_and_no_numbers(tmp_path: Path) -> None:
    cell, lost = replace(CELL, method="eagle2"), Status(state="oom", reason="18 GiB")
    write_cell(tmp_path / "lost", cell, [generation("a", [1, 2, 3, 4], 1.0)], lost)
    row = rows(pair_of_cells(tmp_path))["lost"]
    assert (row.status, row.reason, row.tokens_per_s, row.num_prompts) == ("oom", "18 GiB", None, 1)


def test_replayed_acceptance_gets_a_speedup_and_no_verdict(tmp_path: Path) -> None:
    cell = replace(CELL, method="eagle2", acceptance="replay:published")
    write_cell(tmp_path / "replay", cell, [generation("a", [7, 7, 7, 7], 2.0, accepted=[3])])
    row = rows(pair_of_cells(tmp_path))["replay"]
    assert (row.speedup, row.agreement, row.lossless) == (2.0, None, "")
    assert row.synthetic


def test_prediction_uses_measured_costs(tmp_path: Path) -> None:
    # n = 5 lies between 4 and 8: 1.3 + 0.1 = 1.4; 2.4 / (0.6 / 1 + 1.4 / 1) = 1.2.
    verify = [cost("verify", 1, [1.0]), cost("verify", 4, [1.3]), cost("verify", 8, [1.7])]
    bare = replace(CELL, door="cost", task="")
    write_cell(tmp_path / "cost", replace(bare, method=""), verify)
    drafter = replace(bare, method="chain", draft_scheme="dense")
    write_cell(tmp_path / "cost-chain", drafter, [cost("draft", 5, [0.6])])
    assert rows(pair_of_cells(tmp_path))["dense-chain"].predicted_speedup == pytest.approx(1.2)


def test_prediction_is_empty_where_costs_were_not_measured(tmp_path: Path) -> None:
    assert rows(pair_of_cells(tmp_path))["dense-chain"].predicted_speedup is None


def test_compatibility_is_the_ratio_of_speedups(tmp_path: Path) -> None:
    packed = replace(CELL, scheme="w4a16-g128")
    arm = replace(packed, method="chain", draft_scheme="dense")
    write_cell(tmp_path / "packed", packed, [generation(p, [1, 2, 3, 4], 2.0) for p in "abc"])
    write_cell(tmp_path / "packed-chain", arm, [generation(p, [1, 2, 3, 4], 2.0) for p in "abc"])
    row = rows(pair_of_cells(tmp_path))["packed-chain"]
    assert (row.speedup, row.compatibility) == pytest.approx((1.0, 0.5))


def test_compatibility_divides_four_rates() -> None:
    interval = BOOTSTRAP.over_prompts({"a": [6.0, 1, 2, 1, 8, 1, 2, 1]}, compatibility)
    assert interval.value == pytest.approx(3 / 4)
