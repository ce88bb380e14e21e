"""Price beside speed, from hand-made records: quality, accuracy, categories, change of tau."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest

from bench import terminal
from bench.category_table import category_rows
from bench.caveats import warnings
from bench.page import Group
from bench.quality_table import quality_rows
from bench.record import Generation, Quality, Status
from bench.report import FORMATS, sections, tables, write
from bench.results import load
from bench.rows import CellRow, QualityRow
from bench.stats import Bootstrap, accuracy, cell_rows
from tests.bench.made_campaign import CELL, generation, write_cell

BOOTSTRAP = Bootstrap(samples=2000, confidence=0.95, seed=0)
TEXT = replace(CELL, door="quality", task="perplexity")
PACKED = replace(TEXT, scheme="w4a16-g128")
LN2 = math.log(2)


def window(
    number: int, nll: float, kl: float | None, agree: int | None, tokens: int = 10
) -> Quality:
    return Quality(
        window=number,
        start=10 * number,
        context=6,
        tokens=tokens,
        nll_nats=nll,
        kl_nats=kl,
        top1_agree=agree,
    )


def price(root: Path) -> Path:
    """Dense has perplexity 4, w4a16 has 8; the windows of dense have 2 and 8, of w4a16 4 and 16."""
    dense = [window(0, 10 * LN2, 0.0, 10), window(1, 30 * LN2, 0.0, 10)]
    packed = [window(0, 20 * LN2, 1.0, 9), window(1, 40 * LN2, 3.0, 6)]
    write_cell(root / "dense-text", TEXT, dense)
    write_cell(root / "packed-text", PACKED, packed)
    return root


def prices(root: Path) -> dict[str, QualityRow]:
    return {row.cell: row for row in quality_rows(load(root), BOOTSTRAP)}


def cells(root: Path) -> dict[str, CellRow]:
    return {row.cell: row for row in cell_rows(load(root), BOOTSTRAP)}


def test_perplexity_is_exp_of_the_mean_over_all_tokens(tmp_path: Path) -> None:
    rows = prices(price(tmp_path))
    assert rows["dense-text"].perplexity == pytest.approx(4)
    assert rows["packed-text"].perplexity == pytest.approx(8)
    assert (rows["packed-text"].num_windows, rows["packed-text"].num_tokens) == (2, 20)


def test_interval_of_two_windows_spans_both(tmp_path: Path) -> None:
    # Resamples hold a window twice with odds 1:2:1, so the outer 2.5% are its own perplexity.
    row = prices(price(tmp_path))["packed-text"]
    assert (row.perplexity_low, row.perplexity_high) == pytest.approx((4, 16))


def test_increase_is_paired_window_by_window(tmp_path: Path) -> None:
    # Unpaired, the extremes would be 4 - 8 and 16 - 2; paired they are 4 - 2 and 16 - 8.
    row = prices(price(tmp_path))["packed-text"]
    assert (row.increase_low, row.increase, row.increase_high) == pytest.approx((2, 4, 8))
    assert row.num_paired == 2


def test_divergence_and_agreement_are_per_token(tmp_path: Path) -> None:
    row = prices(price(tmp_path))["packed-text"]
    assert (row.kl_low, row.kl_nats, row.kl_high) == pytest.approx((0.1, 0.2, 0.3))
    assert (row.top1_low, row.top1_agreement, row.top1_high) == pytest.approx((0.6, 0.75, 0.9))


def test_windows_weigh_by_their_tokens(tmp_path: Path) -> None:
    # (10 + 20) ln 2 over 10 + 5 tokens are 2 ln 2 a token; the mean of two perplexities is 9.
    unlike = [window(0, 10 * LN2, None, None), window(1, 20 * LN2, None, None, tokens=5)]
    write_cell(tmp_path / "dense-text", TEXT, unlike)
    row = prices(tmp_path)["dense-text"]
    assert row.perplexity == pytest.approx(4)
    assert (row.kl_nats, row.top1_agreement) == (None, None)


def test_dense_has_no_increase(tmp_path: Path) -> None:
    row = prices(price(tmp_path))["dense-text"]
    assert (row.increase, row.num_paired, row.reason) == (None, None, "")


def test_other_windows_are_no_pair(tmp_path: Path) -> None:
    price(tmp_path)
    write_cell(tmp_path / "w8", replace(TEXT, scheme="w8a8"), [window(7, 1.0, 0.1, 9)])
    row = prices(tmp_path)["w8"]
    assert (row.increase, row.reason) == (None, "no window in common with dense")


@pytest.mark.parametrize("field", ["model", "weights", "task", "device", "dtype", "lm_head"])
def test_dense_of_another_kind_is_no_reference(tmp_path: Path, field: str) -> None:
    write_cell(tmp_path / "dense", replace(TEXT, **{field: "other"}), [window(0, 1.0, 0.0, 10)])
    write_cell(tmp_path / "packed", PACKED, [window(0, 1.0, 0.1, 9)])
    row = prices(tmp_path)["packed"]
    assert (row.increase, row.reason) == (
        None,
        "no finished dense cell of the same text and device",
    )


def test_a_quantised_lm_head_is_held_against_an_all_dense_target(tmp_path: Path) -> None:
    price(tmp_path)
    head = replace(TEXT, lm_head="w4a16-g128")
    write_cell(tmp_path / "head", head, [window(0, 20 * LN2, 0.1, 9)])
    row = prices(tmp_path)["head"]
    assert row.target == "dense, lm_head w4a16-g128"
    assert row.increase == pytest.approx(4 - 2)


def test_a_failed_cell_is_a_row_with_its_reason(tmp_path: Path) -> None:
    write_cell(price(tmp_path) / "lost", replace(PACKED, scheme="w8a8"), [], Status(state="oom"))
    row = prices(tmp_path)["lost"]
    assert (row.status, row.perplexity) == ("oom", None)


def scored(prompt_id: str, *, correct: bool | None, category: str = "maths") -> Generation:
    return replace(generation(prompt_id, [1, 2, 3, 4], 4.0), correct=correct, category=category)


def test_accuracy_is_wilsons_of_what_was_scored() -> None:
    # 8 of 10, z = 1.96: Wilson's interval by the textbook is 0.490 to 0.943.
    answers = [scored(str(i), correct=i < 8) for i in range(10)]
    found = accuracy([*answers, scored("x", correct=None)], 0.95)
    assert found.value == pytest.approx(0.8)
    assert (found.low, found.high) == pytest.approx((0.4901625, 0.9433178), rel=1e-5)


def test_all_correct_still_has_a_width() -> None:
    # Wilson's lower bound at n of n is n / (n + z^2).
    found = accuracy([scored(str(i), correct=True) for i in range(10)], 0.95)
    assert (found.low, found.high) == pytest.approx((10 / (10 + 1.959964**2), 1.0), rel=1e-6)


def test_nothing_scored_is_no_accuracy(tmp_path: Path) -> None:
    write_cell(tmp_path / "plain", CELL, [scored("a", correct=None)])
    row = cells(tmp_path)["plain"]
    assert (row.accuracy, row.accuracy_low, row.num_scored) == (None, None, 0)


def moved(root: Path) -> Path:
    """chain keeps 5/2 and 4/1 tokens a step on dense, 4/2 and 4/4 on w4a16."""
    for scheme, accepted in (("dense", ([2, 1], [3])), ("w4a16-g128", ([1, 1], [0] * 4))):
        cell = replace(CELL, scheme=scheme, task="mt_bench")
        chain = [
            generation(p, [1, 2, 3, 4], 2.0, accepted=a)
            for p, a in zip("ab", accepted, strict=True)
        ]
        chain = [replace(g, category=c) for g, c in zip(chain, ("maths", "code"), strict=True)]
        plain = [scored("a", correct=True), scored("b", correct=False, category="code")]
        write_cell(root / f"{scheme}-vanilla", cell, plain)
        arm = replace(cell, method="chain", draft_scheme="dense")
        write_cell(root / f"{scheme}-chain", arm, chain)
    return root


def test_change_of_tau_is_paired_by_prompt(tmp_path: Path) -> None:
    # Together 8/6 against 9/3; alone 4/2 against 5/2 and 4/4 against 4/1.
    row = cells(moved(tmp_path))["w4a16-g128-chain"]
    assert row.acceptance_length == pytest.approx(8 / 6)
    assert row.acceptance_change == pytest.approx(8 / 6 - 9 / 3)
    assert (row.acceptance_change_low, row.acceptance_change_high) == pytest.approx((-3, -0.5))


def test_tau_changes_without_a_baseline_too(tmp_path: Path) -> None:
    moved(tmp_path)
    for path in (tmp_path / "w4a16-g128-vanilla").iterdir():
        path.unlink()
    row = cells(tmp_path)["w4a16-g128-chain"]
    assert (row.speedup, row.acceptance_change) == (None, pytest.approx(8 / 6 - 9 / 3))


def test_a_later_turn_of_another_prompt_does_not_move_tau(tmp_path: Path) -> None:
    moved(tmp_path)
    for scheme, answer, accepted in (("dense", [1, 2], [1]), ("w4a16-g128", [1, 9], [1])):
        arm = replace(CELL, scheme=scheme, method="eagle2", draft_scheme="dense", task="mt_bench")
        turns = [
            generation("a", answer, 1.0, accepted=accepted),
            generation("a", [1] * 9, 1.0, turn=1, accepted=[8] if scheme == "dense" else [0] * 9),
        ]
        write_cell(tmp_path / f"{scheme}-eagle2", arm, turns)
    assert cells(tmp_path)["w4a16-g128-eagle2"].acceptance_change == 0


def test_dense_moves_no_tau(tmp_path: Path) -> None:
    assert cells(moved(tmp_path))["dense-chain"].acceptance_change is None


def test_a_category_has_speed_acceptance_and_accuracy(tmp_path: Path) -> None:
    rows = {(r.cell, r.category): r for r in category_rows(load(moved(tmp_path)), BOOTSTRAP)}
    row = rows["w4a16-g128-chain", "maths"]
    assert (row.tokens_per_s, row.speedup, row.acceptance_length) == pytest.approx((2.0, 2.0, 2.0))
    assert (row.accuracy, row.num_scored) == (None, 0)
    assert rows["dense-vanilla", "code"].accuracy == 0
    assert rows["dense-vanilla", "maths"].accuracy == 1


@pytest.fixture
def reported(tmp_path: Path) -> Path:
    root = price(moved(tmp_path / "c"))
    write(tables(load(root), BOOTSTRAP), root / "report", FORMATS)
    return root / "report"


def test_the_matrix_has_a_price_beside_its_speed(tmp_path: Path) -> None:
    (measured, synthetic) = sections(tables(load(price(moved(tmp_path))), BOOTSTRAP))
    (group,) = measured.groups
    assert group.texts == ["perplexity"]
    found = group.price("w4a16-g128", "perplexity")
    assert found is not None
    assert found.increase == pytest.approx(4)
    assert (synthetic.qualities, synthetic.groups) == ([], [])


def test_a_price_in_another_dtype_is_not_joined(tmp_path: Path) -> None:
    report = tables(load(price(moved(tmp_path))), BOOTSTRAP)
    rows = [replace(r, dtype="bfloat16") for r in report.cells]
    assert Group(rows=rows, qualities=report.qualities).texts == []


def test_page_and_markdown_have_every_table(reported: Path) -> None:
    html, markdown = (reported / "index.html").read_text(), (reported / "report.md").read_text()
    for title in ("What does a scheme cost in quality?", "How many answers are correct?"):
        assert f"<h3>{title}</h3>" in html
    assert "<h3>Does quantisation move tau?</h3>" in html
    assert '<svg role="img" class="quality"' in html
    assert "8.000<small>+4.000 over dense</small><small>KL 0.200 nats</small>" in html
    assert "| dense | 1.000 | 2.00x (2.00-2.00), tau 3.000 | exact | 4.000 |" in markdown
    assert "| lab_small | perplexity | w4a16-g128 | 20 | 8.000 (4.000 to 16.00) | " in markdown
    assert "| +4.000 (2.000 to 8.000) | 0.200 (0.100 to 0.300) | " in markdown
    assert "| chain | w4a16-g128 | 1.333 (1.000 to 2.000) | -1.667 (-3.000 to -0.500) |" in markdown
    assert "| mt_bench | dense | vanilla | 2 | 0.50 (0.095 to 0.905) |" in markdown
    assert "| dense | chain | 2.00x, tau 4.000 | 2.00x, tau 2.500 |" in markdown


def test_few_windows_are_said_to_be_few(tmp_path: Path) -> None:
    campaign = load(price(tmp_path))
    told = "2 cells of quality with fewer than 20 windows: their intervals are rough themselves."
    assert told in warnings(campaign, [])


def test_quality_table_is_a_file(reported: Path) -> None:
    with (reported / "quality.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["scheme"], round(float(r["perplexity"]), 6)) for r in rows] == [
        ("dense", 4.0),
        ("w4a16-g128", 8.0),
    ]


def test_terminal_shows_the_price(tmp_path: Path) -> None:
    assert terminal.quality_table(quality_rows(load(price(tmp_path)), BOOTSTRAP)) == (
        "lab_small reading perplexity: lab weights, cpu, float32, up to 20 tokens\n"
        "  scheme      perplexity             over dense               KL nats                  "
        "same top-1               status\n"
        "  dense       4.000 [2.000, 8.000]                            0.0000 [0.0000, 0.0000]  "
        "100.0% [100.0%, 100.0%]  done\n"
        "  w4a16-g128  8.000 [4.000, 16.000]  +4.000 [+2.000, +8.000]  0.2000 [0.1000, 0.3000]  "
        "75.0% [60.0%, 90.0%]     done\n"
    )


def test_terminal_shows_accuracy_where_there_is_any(tmp_path: Path) -> None:
    rows = [r for r in cell_rows(load(moved(tmp_path)), BOOTSTRAP) if r.scheme == "dense"]
    assert terminal.cell_table(rows).splitlines()[1:] == [
        "  scheme  method   tok/s  speed-up            tau  same tokens  correct            status",
        "  dense   vanilla    1.0  1.00               1.00  -            0.50 [0.09, 0.91]  done",
        "  dense   chain      2.0  2.00 [2.00, 2.00]  3.00  100% exact                      done",
    ]
