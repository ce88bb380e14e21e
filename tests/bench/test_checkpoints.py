"""Several checkpoints in one campaign: cells of their own, and no ratio across weights."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bench.block import Arm
from bench.caveats import warnings
from bench.config import parse
from bench.plan import Planner
from bench.quality_table import quality_rows
from bench.record import Quality, Status
from bench.results import Campaign, load
from bench.rows import CellRow
from bench.stats import Bootstrap, cell_rows
from tests.bench.made_campaign import CELL, cost, generation, pair_of_cells, write_cell
from tests.bench.tiny import planned, write_tokenizer, write_world
from tests.methods.test_stored import write_native

BOOTSTRAP = Bootstrap(samples=200, confidence=0.95, seed=0)
STORED = replace(CELL, scheme="w4a16-g128+gptq", stored=True, target_hash="b" * 64, folder="gptq")


@pytest.fixture
def world(tmp_path: Path) -> list[str]:
    return write_world(tmp_path)


def arms(planner: Planner) -> list[Arm]:
    return [arm for block in planner.blocks() for arm in block.arms]


def rows(root: Path) -> tuple[Campaign, dict[str, CellRow]]:
    campaign = load(root)
    return campaign, {row.cell: row for row in cell_rows(campaign, BOOTSTRAP)}


def said(root: Path) -> str:
    campaign, found = rows(root)
    return "\n".join(warnings(campaign, list(found.values())))


def write_pair(root: Path, *hashes: str, scheme: str = "dense", runs: Sequence[str] = "aa") -> None:
    """Write vanilla and chain of one label. hashes, runs: of the one and of the other."""
    cell = replace(CELL, scheme=scheme)
    for method, target, run, seconds in zip(
        ("vanilla", "chain"), hashes, runs, (2, 1), strict=True
    ):
        done = [replace(generation(p, [1, 2], seconds), run=run) for p in ("a", "b")]
        own = replace(cell, method=method, target_hash=target)
        write_cell(root / f"{scheme}-{method}", own, done)


def test_two_folders_of_one_label_are_two_cells(world: list[str], tmp_path: Path) -> None:
    scheme = parse(arms(planned(world, "quant=w4a16"))[0].config).schemes.target
    for name in ("ours", "theirs"):
        write_tokenizer(write_native(tmp_path / "target", tmp_path / name, scheme))
    planner = Planner("bench.cell")
    for name in ("ours", "theirs"):
        where = f"model.target={tmp_path / name}"
        planned([*world, where], "quant=checkpoint", planner=planner)
    ours, theirs = arms(planner)
    label = ours.cell.scheme
    assert label == theirs.cell.scheme
    assert ours.name == f"lab.{label}.vanilla.lab.model.target=ours"
    assert theirs.name == f"lab.{label}.vanilla.lab.model.target=theirs"
    assert (ours.cell.model, ours.cell.folder, ours.cell.stored) == ("lab", "ours", True)


def test_a_copy_of_a_target_has_its_hash_and_another_has_not(
    world: list[str], tmp_path: Path
) -> None:
    shutil.copytree(tmp_path / "target", tmp_path / "copy")
    targets = [[], [f"model.target={tmp_path / 'copy'}"], [f"model.target={tmp_path / 'small'}"]]
    own, copy, other = (arms(planned([*world, *where]))[0].cell for where in targets)
    assert own.target_hash == copy.target_hash
    assert own.target_hash != other.target_hash


def test_a_dense_folder_read_as_stored_is_the_dense_cell(world: list[str]) -> None:
    assert arms(planned(world, "quant=checkpoint")) == arms(planned(world, "quant=dense"))


def test_other_weights_under_one_label_have_no_ratio(tmp_path: Path) -> None:
    write_pair(tmp_path, "a" * 64, "b" * 64)
    _, found = rows(tmp_path)
    assert found["dense-chain"].speedup is None
    assert (
        "Targets of one label have different weights, and are not compared: "
        "aaaaaaaaaa: dense-vanilla; bbbbbbbbbb: dense-chain." in said(tmp_path)
    )


@pytest.mark.parametrize("hashes", [("a" * 64, "a" * 64), ("a" * 64, ""), ("", "")])
def test_the_same_weights_or_unknown_ones_are_compared(
    tmp_path: Path, hashes: tuple[str, str]
) -> None:
    write_pair(tmp_path, *hashes)
    assert rows(tmp_path)[1]["dense-chain"].speedup == 2.0
    assert "different weights" not in said(tmp_path)


def test_a_scheme_over_other_weights_is_not_held_against_dense(tmp_path: Path) -> None:
    write_pair(tmp_path, "a" * 64, "a" * 64)
    write_pair(tmp_path, "b" * 64, "b" * 64, scheme="w8a8")
    found = rows(tmp_path)[1]["w8a8-chain"]
    assert (found.speedup, found.compatibility, found.acceptance_change) == (2.0, None, None)
    assert "Targets of one label have different weights" in said(tmp_path)


def test_a_stored_folder_is_held_against_dense_and_says_on_what_trust(tmp_path: Path) -> None:
    write_pair(tmp_path, "a" * 64, "a" * 64)
    for method, seconds in (("vanilla", 2), ("chain", 1)):
        done = [generation(p, [1, 2], seconds) for p in ("a", "b")]
        write_cell(tmp_path / f"gptq-{method}", replace(STORED, method=method), done)
    found = rows(tmp_path)[1]["gptq-chain"]
    assert (found.compatibility, found.target) == (1.0, "w4a16-g128+gptq (gptq)")
    assert "nothing tells whether they were quantised from it: gptq." in said(tmp_path)
    assert "different weights" not in said(tmp_path)


def test_quality_is_not_paired_over_other_weights(tmp_path: Path) -> None:
    window = Quality(window=0, start=0, context=1, tokens=4, nll_nats=2.0)
    cell = replace(CELL, door="quality", target_hash="a" * 64)
    write_cell(tmp_path / "dense", cell, [window])
    write_cell(tmp_path / "same", replace(cell, scheme="w8a8"), [window])
    write_cell(tmp_path / "other", replace(cell, scheme="fp8", target_hash="b" * 64), [window])
    found = {row.cell: row for row in quality_rows(load(tmp_path), BOOTSTRAP)}
    assert (found["same"].increase, found["other"].increase) == (0.0, None)
    assert found["other"].reason == "no finished dense cell of the same text and device"


def test_an_arm_of_another_run_than_its_vanilla_is_named(tmp_path: Path) -> None:
    write_pair(tmp_path, "", "", runs=("monday/1", "tuesday/2"))
    assert "Timed in another run than their vanilla" in said(tmp_path)
    assert said(tmp_path).endswith("side by side: dense-chain (2 of 2 turns).")


@pytest.mark.parametrize("runs", [("monday/1", "monday/1"), ("monday/1", ""), ("", "")])
def test_arms_of_one_run_or_of_none_that_is_known_are_not(
    tmp_path: Path, runs: tuple[str, str]
) -> None:
    write_pair(tmp_path, "", "", runs=runs)
    assert "another run" not in said(tmp_path)


@pytest.mark.parametrize(
    ("costs", "reason"),
    [
        ({"": [("verify", 1), ("verify", 4)]}, "measured for 1 to 4 tokens read at once, it needs"),
        ({"": [("verify", 1), ("verify", 8)]}, "no cost of its drafter was measured"),
        ({"chain": [("draft", 5)]}, "no cost of reading by its target was measured"),
    ],
)
def test_a_missing_prediction_says_what_was_not_measured(
    tmp_path: Path, costs: dict[str, list[tuple[str, int]]], reason: str
) -> None:
    pair_of_cells(tmp_path)
    for method, sizes in costs.items():
        drafts = "dense" if method else ""
        cell = replace(CELL, door="cost", method=method, task="cost", draft_scheme=drafts)
        write_cell(tmp_path / f"cost-{method}", cell, [cost(what, n, [1.0]) for what, n in sizes])
    (line,) = [line for line in said(tmp_path).splitlines() if "predicted" in line]
    assert reason in line
    assert line.endswith(": dense-chain.")


def test_no_prediction_is_missed_where_no_cost_was_measured(tmp_path: Path) -> None:
    assert "predicted" not in said(pair_of_cells(tmp_path))


def test_unfinished_cells_are_no_other_weights(tmp_path: Path) -> None:
    write_pair(tmp_path, "a" * 64, "a" * 64)
    failed = replace(CELL, method="eagle2", target_hash="b" * 64)
    write_cell(tmp_path / "failed", failed, [], Status(state="failed"))
    assert "different weights" not in said(tmp_path)
