"""What a report says of a token's energy: a target held at two widths and two contexts."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bench import terminal
from bench.record import Cell, Cost, Generation
from bench.report import FORMATS, tables, write
from bench.results import load
from bench.rows import CellRow
from bench.stats import Bootstrap
from tests.bench.made_campaign import CELL, cost, generation, pair_of_cells, write_cell

BOOTSTRAP = Bootstrap(samples=200, confidence=0.95, seed=0)
EAGLE = replace(CELL, method="eagle2", draft_scheme="dense")
TARGETS_OWN = replace(CELL, door="cost", method="", task="")
DRAFTERS = replace(TARGETS_OWN, method="eagle2", draft_scheme="dense")


def held(what: str, n: int, seconds: float, context: int, energy_mj: float | None) -> Cost:
    return replace(cost(what, n, [seconds], context), energy_mj=energy_mj)


READS = [
    held("verify", 1, 0.010, 64, 1000.0),
    held("verify", 61, 0.020, 64, 2000.0),
    held("verify", 1, 0.010, 512, 6400.0),
    held("verify", 61, 0.018, 512, 13400.0),
]
PROPOSALS = [held("draft", 49, 0.002, 64, 50.0), held("draft", 49, 0.002, 512, 1120.0)]


def decoded(*, seconds: float, accepted: list[int], drafted: int) -> Generation:
    """41 tokens after a prompt of 480: 500 and a half are decided on average, 512 is near."""
    made = generation("a", list(range(41)), seconds, accepted=accepted)
    return replace(made, prompt_tokens=480, drafted=[drafted] * len(accepted))


def campaign(
    root: Path, reads: list[Cost], proposals: list[Cost], *, targets_own: Cell = TARGETS_OWN
) -> Path:
    """Vanilla, and EAGLE-2 at 41 tokens in 10 steps of 48 drafts: tau 4.1, n = 49."""
    plain = decoded(seconds=0.41, accepted=[0] * 41, drafted=0)
    tree = decoded(seconds=0.2, accepted=[4, 2, 3, 3, 3, 4, 2, 3, 3, 4], drafted=48)
    write_cell(root / "vanilla", CELL, [plain])
    write_cell(root / "eagle2", EAGLE, [tree])
    write_cell(root / "cost", targets_own, reads)
    write_cell(root / "cost-eagle2", DRAFTERS, proposals)
    return root


def cells(root: Path) -> dict[str, CellRow]:
    return {r.cell: r for r in tables(load(root), BOOTSTRAP).cells}


def told(row: CellRow) -> tuple[float | None, float | None]:
    return row.joules_per_token, row.energy_ratio


def timed(costs: list[Cost], *ns: int) -> list[Cost]:
    """The costs, without the energy of some widths."""
    return [replace(c, energy_mj=None) if c.n in ns else c for c in costs]


def test_a_token_takes_its_share_of_a_proposal_and_a_read(tmp_path: Path) -> None:
    # n = 49 of 1..61: 6.4 + 0.8 * 7 = 12 J; (1.12 + 12) / 4.1 = 3.2 J; 6.4 / 3.2 = 2.
    row = cells(campaign(tmp_path, READS, PROPOSALS))["eagle2"]
    assert row.acceptance_length == pytest.approx(4.1)
    assert told(row) == pytest.approx((3.2, 2.0))


def test_a_token_of_vanilla_takes_one_read(tmp_path: Path) -> None:
    assert told(cells(campaign(tmp_path, READS, PROPOSALS))["vanilla"]) == (6.4, 1.0)


def test_costs_that_were_never_held_give_no_joules(tmp_path: Path) -> None:
    rows = cells(campaign(tmp_path, timed(READS, 1, 61), timed(PROPOSALS, 49)))
    assert [told(r) for r in rows.values()] == [(None, None)] * 2
    assert rows["eagle2"].predicted_speedup == pytest.approx(4.1 / (0.2 + 1.64))


def test_a_tree_beyond_the_held_widths_has_no_joules(tmp_path: Path) -> None:
    reads = timed([*READS, held("verify", 33, 0.016, 512, 10000.0)], 61)
    rows = cells(campaign(tmp_path, reads, PROPOSALS))
    assert told(rows["eagle2"]) == (None, None)
    assert told(rows["vanilla"]) == (6.4, 1.0)
    assert rows["eagle2"].predicted_speedup is not None


def test_without_the_energy_of_one_token_there_is_no_ratio(tmp_path: Path) -> None:
    reads = timed([*READS, held("verify", 37, 0.016, 512, 10600.0)], 1)
    rows = cells(campaign(tmp_path, reads, PROPOSALS))
    # Half way from 37 to 61: (1.12 + 12) / 4.1.
    assert rows["eagle2"].joules_per_token == pytest.approx(3.2)
    assert rows["eagle2"].energy_ratio is None
    assert told(rows["vanilla"]) == (None, None)


def test_a_width_that_was_only_timed_is_passed_over(tmp_path: Path) -> None:
    reads = [*READS, held("verify", 49, 0.5, 512, None)]
    row = cells(campaign(tmp_path, reads, PROPOSALS))["eagle2"]
    assert told(row) == pytest.approx((3.2, 2.0))
    assert row.predicted_speedup == pytest.approx(4.1 / (0.2 + 50))


def test_a_proposal_that_was_not_held_leaves_its_method_without_joules(tmp_path: Path) -> None:
    rows = cells(campaign(tmp_path, READS, timed(PROPOSALS, 49)))
    assert told(rows["eagle2"]) == (None, None)
    assert told(rows["vanilla"]) == (6.4, 1.0)


def test_the_energy_of_another_target_says_nothing(tmp_path: Path) -> None:
    other = replace(TARGETS_OWN, scheme="w4a16-g128")
    rows = cells(campaign(tmp_path, READS, PROPOSALS, targets_own=other))
    assert [told(r) for r in rows.values()] == [(None, None)] * 2


def test_every_form_of_the_report_shows_joules(tmp_path: Path) -> None:
    report = tables(load(campaign(tmp_path, READS, PROPOSALS)), BOOTSTRAP)
    write(report, tmp_path / "report", FORMATS)
    text = (tmp_path / "report" / "report.md").read_text()
    assert (
        "| model | task | scheme | method | predicted | measured (decode) | error | J/token | "
        "energy ratio |\n|---|---|---|---|---:|---:|---:|---:|---:|\n"
        "| lab_small | gsm8k | dense | eagle2 | 2.228 | 2.050 | +9% | 3.200 | 2.000 |\n"
    ) in text
    html = (tmp_path / "report" / "index.html").read_text()
    assert (
        '<th class="n">error</th><th class="n">J/token</th><th class="n">energy ratio</th></tr>'
    ) in html
    assert '<td class="n">3.200</td><td class="n">2.00&times;</td></tr>' in html
    assert "Energy ratio: plain decoding's over these; above 1 the method saves energy." in html
    with (tmp_path / "report" / "table.csv").open(newline="") as file:
        rows = {r["cell"]: r for r in csv.DictReader(file)}
    assert float(rows["eagle2"]["joules_per_token"]) == pytest.approx(3.2)
    assert float(rows["eagle2"]["energy_ratio"]) == pytest.approx(2.0)
    assert float(rows["vanilla"]["joules_per_token"]) == 6.4
    assert terminal.cell_table(report.cells).splitlines()[1:] == [
        "  scheme  method   tok/s  speed-up   tau  same tokens  J/token  energy ratio  status",
        "  dense   vanilla  100.0  1.00      1.00  -              6.400          1.00  done",
        "  dense   eagle2   205.0  2.05      4.10  100% exact     3.200          2.00  done",
    ]


def test_a_cell_without_joules_is_empty_beside_one_that_has_them(tmp_path: Path) -> None:
    root = campaign(tmp_path, READS, timed(PROPOSALS, 49))
    chain = replace(EAGLE, method="chain")
    steps = decoded(seconds=0.4, accepted=[1] * 20 + [0], drafted=48)
    write_cell(root / "chain", chain, [steps])
    write_cell(root / "cost-chain", replace(DRAFTERS, method="chain"), PROPOSALS)
    report = tables(load(root), BOOTSTRAP)
    write(report, tmp_path / "report", FORMATS)
    text = (tmp_path / "report" / "report.md").read_text()
    # tau 41 / 21: (1.12 + 12) / tau = 6.72 J, plain decoding's 6.4 are 0.952 of it.
    assert re.findall(r"\| dense \| (\w+) \|.*% \| (.*) \| (.*) \|\n", text) == [
        ("chain", "6.720", "0.952"),
        ("eagle2", "", ""),
    ]


def test_a_report_of_costs_without_energy_shows_no_joules(tmp_path: Path) -> None:
    reads = [cost("verify", 1, [1.0]), cost("verify", 8, [1.7])]
    root = pair_of_cells(tmp_path)
    write_cell(root / "cost", TARGETS_OWN, reads)
    write_cell(root / "cost-chain", replace(DRAFTERS, method="chain"), [cost("draft", 5, [0.6])])
    report = tables(load(root), BOOTSTRAP)
    write(report, root / "report", FORMATS)
    text = (root / "report" / "report.md").read_text()
    assert (
        "| model | task | scheme | method | predicted | measured (decode) | error |\n"
        "|---|---|---|---|---:|---:|---:|\n"
        "| lab_small | gsm8k | dense | chain | 1.200 | 2.400 | -50% |\n"
    ) in text
    assert "J/token" not in text
    assert "J/token" not in (root / "report" / "index.html").read_text()
    assert "J/token" not in terminal.cell_table(report.cells)
    with (root / "report" / "table.csv").open(newline="") as file:
        found = [(r["joules_per_token"], r["energy_ratio"]) for r in csv.DictReader(file)]
    assert found == [("", ""), ("", "")]


def test_joules_stand_between_the_share_of_correct_answers_and_the_status(tmp_path: Path) -> None:
    rows = tables(load(campaign(tmp_path, READS, PROPOSALS)), BOOTSTRAP).cells
    scored = [replace(r, accuracy=0.5, accuracy_low=0.2, accuracy_high=0.8) for r in rows]
    assert terminal.cell_table(scored).splitlines()[1:3] == [
        "  scheme  method   tok/s  speed-up   tau  same tokens  correct            J/token  "
        "energy ratio  status",
        "  dense   vanilla  100.0  1.00      1.00  -            0.50 [0.20, 0.80]    6.400  "
        "        1.00  done",
    ]
