from dataclasses import replace
from pathlib import Path

import pytest

from bench.record import Status, write_json
from bench.results import load
from tests.bench.made_campaign import (
    CELL,
    CONTEXT,
    as_json,
    generation,
    pair_of_cells,
    write_cell,
)


def test_cells_are_found_at_any_depth(tmp_path: Path) -> None:
    write_cell(tmp_path / "deep" / "er" / "cell", replace(CELL, task="other"), [])
    assert [c.name for c in load(pair_of_cells(tmp_path)).cells] == [
        "deep/er/cell",
        "dense-chain",
        "dense-vanilla",
    ]


def test_report_folder_is_no_cell(tmp_path: Path) -> None:
    write_cell(tmp_path / "report" / "old", CELL, [])
    assert len(load(pair_of_cells(tmp_path)).cells) == 2


def test_cell_without_status_is_unfinished(tmp_path: Path) -> None:
    write_cell(tmp_path / "open", CELL, [generation("a", [1], 1.0)], None)
    assert load(tmp_path).cells[0].status == Status(state="unfinished")


def test_half_a_line_of_a_killed_cell_is_passed_over(tmp_path: Path) -> None:
    cell = write_cell(tmp_path / "open", CELL, [generation("a", [1], 1.0)], None)
    with (cell / "records.jsonl").open("a") as file:
        file.write('{"schema":1,"prompt')
    assert [g.prompt_id for g in load(tmp_path).cells[0].generations] == ["a"]


def test_half_a_line_of_a_finished_cell_is_refused(tmp_path: Path) -> None:
    cell = write_cell(tmp_path / "whole", CELL, [generation("a", [1], 1.0)])
    with (cell / "records.jsonl").open("a") as file:
        file.write('{"schema":1,"prompt')
    with pytest.raises(ValueError, match=r"whole/records\.jsonl:2"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["cell.json", "context.json", "status.json"])
def test_file_of_another_schema_is_refused_by_name(tmp_path: Path, name: str) -> None:
    cell = write_cell(tmp_path / "new", CELL, [])
    write_json(cell / name, as_json(CELL, schema=2))
    with pytest.raises(ValueError, match=rf"new/{name}: schema must be 1, got 2"):
        load(tmp_path)


def test_record_of_another_schema_is_refused_by_name(tmp_path: Path) -> None:
    cell = write_cell(tmp_path / "new", CELL, [generation("a", [1], 1.0)])
    with (cell / "records.jsonl").open("a") as file:
        file.write('{"schema":2,"prompt_id":"b"}\n')
    with pytest.raises(ValueError, match=r"new/records\.jsonl: record 2: schema must be 1, got 2"):
        load(tmp_path)


def test_context_without_a_schema_is_refused(tmp_path: Path) -> None:
    write_cell(tmp_path / "cell", CELL, [], context={"hostname": "lab-1"})
    with pytest.raises(ValueError, match=r"context\.json: schema must be 1, got None"):
        load(tmp_path)


def test_unknown_keys_of_a_context_are_let_through(tmp_path: Path) -> None:
    write_cell(tmp_path / "cell", CELL, [])
    assert load(tmp_path).cells[0].context == CONTEXT


def test_results_without_a_cell_are_listed(tmp_path: Path) -> None:
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "records.jsonl").touch()
    assert load(pair_of_cells(tmp_path)).stray == ["lost"]


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a campaign must be a folder, got .*/nowhere"):
        load(tmp_path / "nowhere")


def test_empty_campaign_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold at least one cell, got none"):
        load(tmp_path)


def test_unknown_door_is_refused(tmp_path: Path) -> None:
    write_cell(tmp_path / "cell", replace(CELL, door="window"), [])
    with pytest.raises(ValueError, match="door must be one of run, cost, quality, got 'window'"):
        load(tmp_path)


def test_two_baselines_are_refused(tmp_path: Path) -> None:
    campaign = load(pair_of_cells(tmp_path))
    write_cell(tmp_path / "again", CELL, [])
    chain = campaign.runs[1]
    with pytest.raises(ValueError, match="must be unique, got again and dense-vanilla"):
        load(tmp_path).vanilla_of(chain)


def test_unfinished_vanilla_is_no_baseline(tmp_path: Path) -> None:
    write_cell(tmp_path / "open", replace(CELL, task="other"), [], None)
    result = load(tmp_path).cells[0]
    assert load(tmp_path).vanilla_of(result) is None


def test_dense_and_vanilla_come_first(tmp_path: Path) -> None:
    write_cell(tmp_path / "a", replace(CELL, scheme="a-scheme", method="a-method"), [])
    names = [c.name for c in load(pair_of_cells(tmp_path)).runs]
    assert names == ["dense-vanilla", "dense-chain", "a"]
