import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import page, terminal
from bench.caveats import warnings
from bench.cost_table import cost_rows
from bench.report import FORMATS, Tables, sections, tables, write
from bench.results import load
from bench.stats import Bootstrap
from tests.bench.made_campaign import CELL, cost, pair_of_cells, realistic, write_cell

ROOT = Path(__file__).resolve().parents[2]
BOOTSTRAP = Bootstrap(samples=200, confidence=0.95, seed=0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose results/demo is a whole campaign, reported on."""
    made = tmp_path_factory.mktemp("work")
    folder = realistic(made / "results" / "demo")
    write(tables(load(folder), BOOTSTRAP), folder / "report", FORMATS)
    return made


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    return root / "results" / "demo" / "report"


@pytest.fixture(scope="module")
def report(root: Path) -> Tables:
    return tables(load(root / "results" / "demo"), BOOTSTRAP)


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "index.html").read_text()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_table_starts_with_the_columns_of_the_contract(folder: Path) -> None:
    header = (folder / "table.csv").read_text().splitlines()[0].split(",")
    assert header[:16] == [
        *("model", "weights", "scheme", "draft_scheme", "method", "task", "device"),
        *("num_prompts", "num_tokens", "tokens_per_s", "speedup", "speedup_low", "speedup_high"),
        *("acceptance_length", "agreement", "status"),
    ]


def test_every_cell_of_generations_is_a_row(folder: Path) -> None:
    states = [row["status"] for row in read(folder / "table.csv")]
    counts = {state: states.count(state) for state in set(states)}
    assert counts == {"done": 24, "unfinished": 1, "oom": 1, "unsupported": 1}


def test_unmeasured_fields_are_empty(folder: Path) -> None:
    lost = next(r for r in read(folder / "table.csv") if r["status"] == "oom")
    assert (lost["tokens_per_s"], lost["speedup"], lost["agreement"]) == ("", "", "")
    assert lost["reason"] == "needed 18.2 GiB, 11.0 GiB free"


def test_stage_shares_sum_to_one(folder: Path) -> None:
    rows = [r for r in read(folder / "stages.csv") if r["cell"] == "dense-chain-gsm8k"]
    assert sum(float(r["share"]) for r in rows if r["share"]) == pytest.approx(1)


def test_categories_split_the_prompts_of_a_cell(folder: Path) -> None:
    rows = [r for r in read(folder / "categories.csv") if r["cell"] == "dense-chain-gsm8k"]
    assert {r["category"]: r["num_prompts"] for r in rows} == {
        "code": "10",
        "maths": "10",
        "writing": "10",
    }


def test_cost_ratio_is_to_reading_one_token(tmp_path: Path) -> None:
    timed = [cost("verify", 1, [2.0, 2.0]), cost("verify", 8, [3.0, 3.0])]
    write_cell(tmp_path / "cost", replace(CELL, door="cost", method="", task=""), timed)
    rows = cost_rows(load(tmp_path), BOOTSTRAP)
    assert [(r.n, r.ratio, r.ratio_low, r.ratio_high) for r in rows] == [
        (1, 1.0, 1.0, 1.0),
        (8, 1.5, 1.5, 1.5),
    ]
    assert (rows[1].tokens_per_s_at_n, rows[1].gb_per_s) == pytest.approx((8 / 3, 0.017))


def test_cost_without_t1_has_no_ratio_and_says_so(tmp_path: Path) -> None:
    bare = replace(CELL, door="cost", method="", task="")
    write_cell(tmp_path / "cost", bare, [cost("verify", 8, [3.0])])
    row = cost_rows(load(tmp_path), BOOTSTRAP)[0]
    assert (row.ratio, row.reason) == (None, "no T_1 of the same scheme, context and batch")


def test_measured_and_synthetic_cells_stand_in_separate_sections(report: Tables) -> None:
    measured, synthetic = sections(report)
    assert {r.weights for r in measured.rows} == {"lab"}
    assert {r.weights for r in synthetic.rows} == {"random"}
    assert {r.weights for r in synthetic.costs} == {"random"}


def test_page_has_every_figure(html: str) -> None:
    for name in ("speedup", "acceptance-length", "acceptance-at", "verify-cost", "stage-shares"):
        assert f'<svg role="img" class="{name}"' in html
        assert f'<svg role="img" class="{name}-synthetic"' in html


def test_page_needs_no_network(html: str) -> None:
    assert not re.search(r"https?:|//|@import|<link|src=", html.replace("// ", ""))


def test_ids_in_the_page_are_unique(html: str) -> None:
    ids = re.findall(r'\sid="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_page_escapes_what_records_say(html: str) -> None:
    assert "no head for &lt;lab_small&gt;" in html
    assert "<lab_small>" not in html


def test_page_warns_of_cpu_timings_and_of_different_devices(html: str) -> None:
    assert "CPU timings show that the instrument works, not what a GPU would do." in html
    assert "Cells differ in device: Example CPU (32 cells), Example GPU (10 cells)" in html


def test_same_records_give_the_same_bytes(report: Tables, folder: Path, tmp_path: Path) -> None:
    write(report, tmp_path, FORMATS)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_answer_names_the_best_method_and_its_interval(tmp_path: Path) -> None:
    rows = tables(load(pair_of_cells(tmp_path)), BOOTSTRAP).cells
    assert page.Group(rows=rows).answer == (
        "On dense the best method is chain 2.00x (1.78-2.67). "
        "The highest rate is 2.0 tok/s: dense with chain."
    )


def test_interval_around_one_is_no_measurable_difference(tmp_path: Path) -> None:
    rows = tables(load(pair_of_cells(tmp_path)), BOOTSTRAP).cells
    even = [replace(r, speedup=1.1, speedup_low=0.9, speedup_high=1.3) for r in rows]
    assert page.Group(rows=even).answer.startswith(
        "On dense no method is measurably faster than vanilla: "
        "chain 1.10x (0.90-1.30) no measurable difference."
    )


def test_answer_says_when_tokens_differ(report: Tables) -> None:
    group = page.Group(rows=[r for r in report.cells if r.task == "gsm8k" and r.weights == "lab"])
    assert re.search(
        r"chain 0\.\d\dx \([^)]*\) \[tokens DIFFER from vanilla's\] slower", group.answer
    )
    assert group.verdict("w4a16-g128") == "DIFFERENT: chain"


def test_terminal_table(tmp_path: Path) -> None:
    rows = tables(load(pair_of_cells(tmp_path)), BOOTSTRAP).cells
    assert terminal.cell_table(rows) == (
        "lab_small on gsm8k: lab weights, cpu, float32, greedy, up to 3 prompts\n"
        "  scheme  method   tok/s  speed-up            tau  same tokens  status\n"
        "  dense   vanilla    1.0  1.00               1.00  -            done\n"
        "  dense   chain      2.0  2.00 [1.78, 2.67]  2.40  67% ties     done\n"
    )


def test_cells_of_equal_labels_are_named(tmp_path: Path) -> None:
    pair_of_cells(tmp_path)
    write_cell(tmp_path / "again", replace(CELL, method="chain", draft_scheme="dense"), [])
    campaign = load(tmp_path)
    said = page.warnings(campaign, tables(campaign, BOOTSTRAP).cells)
    assert "Cells of the same labels, the first is in the matrix: again, dense-chain." in said


def test_unknown_format_is_refused(report: Tables, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"formats must be among .*, got \['pdf'\]"):
        write(report, tmp_path, ["pdf"])


def test_door_writes_the_report_and_nothing_else(tmp_path: Path) -> None:
    pair_of_cells(tmp_path / "results" / "mine")
    done = run("-m", "bench.report", "campaign=mine", "bootstrap_samples=200", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == str(tmp_path / "results/mine/report/index.html")
    assert [p.name for p in tmp_path.iterdir()] == ["results"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "error: campaign must name a folder of results_dir, as in campaign=demo\n"),
        (
            ["campaign=no", "bootstrap_samples=many"],
            "error: bootstrap_samples must be 100 or more, got 'many'\n",
        ),
        (["campaign=no"], "error: a campaign must be a folder, got {}/results/no\n"),
    ],
)
def test_door_says_what_is_wrong_in_one_line(
    arguments: list[str], line: str, tmp_path: Path
) -> None:
    failed = run("-m", "bench.report", *arguments, cwd=tmp_path)
    assert (failed.returncode, failed.stderr) == (2, line.format(tmp_path))


def test_a_report_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    pair_of_cells(tmp_path / "results" / "mine")
    (tmp_path / "results" / "mine" / "report").touch()
    failed = run("-m", "bench.report", "campaign=mine", "bootstrap_samples=200", cwd=tmp_path)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert failed.stderr.startswith(f"error: {tmp_path / 'results' / 'mine' / 'report'} must be ")


def test_a_table_of_costs_says_what_reading_and_drafting_take(tmp_path: Path) -> None:
    timed = [cost("verify", 1, [0.002] * 2), cost("verify", 8, [0.003] * 2)]
    write_cell(tmp_path / "cost", replace(CELL, door="cost", method="", task=""), timed)
    drafter = replace(CELL, door="cost", method="chain", draft_scheme="w8a8", task="")
    write_cell(tmp_path / "cost-chain", drafter, [cost("draft", 5, [0.001] * 2)])
    assert terminal.cost_table(cost_rows(load(tmp_path), BOOTSTRAP)) == (
        "T_v(n) / T_1 of n tokens after 64, batch 1:\n"
        "  scheme   T_1     1     8\n"
        "  dense   2 ms  1.00  1.50\n"
        "\n"
        "A proposal of n tokens after 64:\n"
        "  scheme  method               n  T_draft  T_draft / T_1\n"
        "  dense   chain, drafter w8a8  5     1 ms           0.50\n"
        "\n"
    )


def test_a_table_of_costs_says_what_was_held(tmp_path: Path) -> None:
    held = {"energy_mj": 12600.0, "held_ms": 18.0, "sm_mhz": 1410, "power_capped": True}
    timed = [cost("verify", 1, [0.002] * 2), replace(cost("verify", 8, [0.003] * 2), **held)]
    write_cell(tmp_path / "cost", replace(CELL, door="cost", method="", task=""), timed)
    drafter = replace(CELL, door="cost", method="chain", draft_scheme="", task="")
    held = {"energy_mj": 99.0, "held_ms": 1.5, "sm_mhz": 1980, "power_capped": False}
    drafts = [replace(cost("draft", 5, [0.001] * 2), **held)]
    write_cell(tmp_path / "cost-chain", drafter, drafts)
    rows = cost_rows(load(tmp_path), BOOTSTRAP)
    assert [(r.energy_mj, r.held_ms, r.sm_mhz, r.power_capped) for r in rows] == [
        (None, None, None, None),
        (12600.0, 18.0, 1410, True),
        (99.0, 1.5, 1980, False),
    ]
    assert terminal.cost_table(rows).partition("Held")[2] == (
        ", a read of n tokens after 64, batch 1:\n"
        "  scheme      1      8\n"
        "  dense   mJ     12600\n"
        "          ms        18\n"
        "          W        700\n"
        "\n"
        "A proposal of n tokens after 64:\n"
        "  scheme  method  n  T_draft  T_draft / T_1  mJ held  ms held  W held\n"
        "  dense   chain   5     1 ms           0.50       99      1.5      66\n"
        "\n"
    )


def test_report_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, bench.report; print({'torch', 'transformers'} & set(sys.modules))"
    assert run("-c", code, cwd=tmp_path).stdout == "set()\n"


def test_notebook_runs_on_a_campaign(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((ROOT / "notebooks" / "explore.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in code)
    (root / "notebooks").mkdir()
    monkeypatch.chdir(root / "notebooks")
    names: dict[str, object] = {}
    for cell in code:
        exec("".join(cell["source"]), names)  # noqa: S102 (our own notebook)


def test_targets_that_are_only_called_the_labs_are_told_in_one_line(tmp_path: Path) -> None:
    write_cell(tmp_path / "own", CELL, [])
    write_cell(tmp_path / "other", replace(CELL, folder="mine", foreign=True), [])
    told = [line for line in warnings(load(tmp_path), []) if "lab weights" in line]
    assert told == [
        "Called lab weights, but neither below models/lab nor recorded as quantised from there: "
        "mine."
    ]
