"""The script that measures an H200: its commands compose, and its tables say what records hold."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import machine
from bench.config import parse, resolve
from bench.record import Cell, Cost, Generation
from scripts.h200 import cases
from scripts.h200_tables import write_tables
from tests.bench.made_campaign import CELL, CONTEXT, write_cell
from tests.test_conf import composed

TARGET = replace(
    CELL, model="llama3_70b", weights="random", scheme="w4a16-g128", task="random", device="cuda"
)


@pytest.mark.parametrize("name", cases())
def test_a_case_composes_and_builds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(machine, "check_gpu", lambda device: None)
    door, *words = cases()[name]
    config = parse(resolve(composed(door, *words, "task=random", "device=cuda", "dtype=float16")))
    assert (config.cost is None) == (door == "run")
    words = name.split(".")
    assert config.settings.exact == ("exact" in words)
    assert config.replays == (len(words) > 2 and not {"exact", "lm_head"} & set(words))


def test_rounds_of_every_target_scheme_are_there() -> None:
    for scheme in ("w4a16", "w8a8", "dense"):
        for method in ("eagle2", "eagle2_shallow", "chain", "hierarchical"):
            assert f"quant={scheme}" in cases()[f"70b.{scheme}.{method}"]
            assert f"70b.{scheme}.{method}.parts" in cases()
    assert "method.min_draft=6" in cases()["70b.w4a16.chain"]
    assert {"method.depth=3", "method.nodes=24"} < set(cases()["70b.w4a16.eagle2_shallow"])
    assert "quant=fp8" in cases()["8b.fp8"]


@pytest.mark.parametrize("name", [name for name in cases() if name.endswith(".parts")])
def test_parts_are_timed_at_the_mean_context_of_their_rounds(name: str) -> None:
    rounds, parts, reads = (
        composed(*cases()[case], "task=random")
        for case in (name.removesuffix(".parts"), name, ".".join(name.split(".")[:2]))
    )
    prompt, answer = rounds.task.draw_lengths[0], rounds.task.max_new_tokens
    assert prompt + answer <= rounds.context
    for timed in (parts, reads):
        assert prompt + answer // 2 in timed.cost.contexts


def test_exact_forwards_are_beside_those_as_they_come() -> None:
    for name in ("8b.w4a16", "8b.w8a8", "70b.w4a16", "70b.w8a8"):
        assert cases()[f"{name}.exact"] == [*cases()[name], "exact=true"]


def answer(*, steps: int, draft_s: float, verify_s: float, host_s: float) -> Generation:
    """Rounds of given parts; 1 s of prompt, 0.5 s of its own, and looks for a stop of 10 ms."""
    return Generation(
        prompt_id="p",
        turn=0,
        category="c",
        status="ok",
        prompt_tokens=500,
        token_ids=list(range(24)),
        accepted=[2] * steps,
        drafted=[47] * steps,
        stage_s={
            "prefill": [1.0],
            "draft_prefill": [0.5],
            "host": [host_s] * steps,
            "draft": [draft_s] * steps,
            "verify": [verify_s] * steps,
            "commit": [0.001] * steps,
            "stop": [0.01] * steps,
        },
        wall_s=1.5 + steps * (host_s + draft_s + verify_s + 0.001 + 0.01),
    )


def cost(what: str, n: int, seconds: float) -> Cost:
    return Cost(
        what=what,
        n=n,
        context=512,
        batch=1,
        forwards=1,
        repeat_s=[seconds, seconds * 0.9, seconds * 1.2],
        weight_bytes=40_000_000_000,
        kv_bytes=0,
        flops=0,
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "records"
    eagle: Cell = replace(TARGET, method="eagle2", draft_scheme="w4a16-g128", acceptance="replay:x")
    rounds = [
        answer(steps=8, draft_s=0.003, verify_s=0.020, host_s=0.0),
        answer(steps=8, draft_s=0.003, verify_s=0.020, host_s=0.001),
    ]
    told = {"start_s": {"command": 4.0, "weights": 1.5, "first_token": 0.25}, "copy_tb_per_s": 4.0}
    write_cell(folder / "eagle", eagle, rounds, context=CONTEXT | told)
    door = replace(TARGET, door="cost")
    reads = [cost("verify", 1, 0.0125), cost("verify", 48, 0.019)]
    write_cell(folder / "reads", door, reads, context=CONTEXT | {"copy_tb_per_s": 5.0})
    proposal = [cost("draft", 48, 0.0035)]
    write_cell(folder / "proposal", replace(eagle, door="cost"), proposal)
    return tmp_path


def test_every_row_has_the_copy_rate_of_its_own_process(out: Path) -> None:
    write_tables(out)
    one, many = rows(out / "forward.csv")
    assert (one["n"], one["median_ms"], one["copy_tb_per_s"]) == ("1", "12.5000", "5.000")
    assert one["share_of_limit"] == "0.640"  # 40 GB at 5 TB/s are 8 ms
    assert many["share_of_limit"] == "0.421"
    (row,) = rows(out / "rounds.csv")
    assert row["copy_tb_per_s"] == "4.000"


def test_energy_is_told_where_it_was_measured(out: Path) -> None:
    held = {"energy_mj": 12640.04, "held_ms": 18.06789, "sm_mhz": 1410, "power_capped": True}
    door = replace(TARGET, door="cost", exact=True)
    write_cell(out / "records" / "held", door, [replace(cost("verify", 1, 0.013), **held)])
    write_tables(out)
    told = {row["exact"]: list(row.values())[-4:] for row in rows(out / "forward.csv")}
    assert told["True"] == ["12640.0", "18.0679", "1410", "True"]
    assert told["False"] == ["", "", "", ""]


def test_a_round_is_held_against_its_parts(out: Path) -> None:
    told = write_tables(out).splitlines()
    (row,) = rows(out / "rounds.csv")
    # 3 + 20 + 1 ms of draft, verify and commit; half of the rounds wait 1 ms for the host
    assert (row["wall_ms"], row["commit_ms"]) == ("24.5000", "1.0000")
    assert row["lost_share"] == "0.0400"  # 1 of 25 ms, of the second prompt
    # timed apart: 3.5, 3.15 and 4.2 of a proposal, 19 in the median of a read of 48, and the commit
    assert row["parts_ms"] == "23.6167"
    assert row["parts_apart"] == "0.0361"
    assert told == [
        "lost_share: at most 4.0% (llama3_70b w4a16-g128 eagle2), within 5%",
        "parts_apart: at most 3.6% (llama3_70b w4a16-g128 eagle2), within 5%",
    ]


@pytest.mark.parametrize(
    ("acceptance", "at_profile"), [("replay:x(tau=4.5)", 1.5), ("replay:x", None)]
)
def test_a_speed_up_is_told_at_the_profiles_own_tau(
    tmp_path: Path, acceptance: str, at_profile: float | None
) -> None:
    rounds = [answer(steps=8, draft_s=0.003, verify_s=0.020, host_s=0.0)]
    replayed = replace(TARGET, acceptance=acceptance)
    eagle = replace(replayed, method="eagle2", draft_scheme="w4a16-g128")
    write_cell(tmp_path / "records" / "eagle", eagle, rounds)
    write_cell(tmp_path / "records" / "plain", replayed, rounds)
    write_tables(tmp_path)
    row, plain = sorted(rows(tmp_path / "rounds.csv"), key=lambda row: row["method"])
    assert (row["tau"], row["speedup"]) == ("3.000", "1.000")
    assert row["speedup_at_profile"] == ("" if at_profile is None else f"{at_profile:.3f}")
    assert plain["speedup_at_profile"] == ""


def test_parts_that_do_not_add_up_are_told(out: Path) -> None:
    (out / "records" / "proposal" / "records.jsonl").unlink()
    write_cell(
        out / "records" / "slow",
        replace(TARGET, method="eagle2", draft_scheme="w4a16-g128", acceptance="replay:x"),
        [answer(steps=8, draft_s=0.003, verify_s=0.020, host_s=0.003)],
    )
    told = write_tables(out).splitlines()
    assert told[0] == "lost_share: at most 11.1% (llama3_70b w4a16-g128 eagle2), BEYOND 5%"
    assert told[1] == "parts_apart: nothing to compare"


def test_a_start_is_told_by_stage(out: Path) -> None:
    write_tables(out)
    (row,) = rows(out / "start.csv")
    assert (row["total_s"], row["command_s"], row["weights_s"]) == ("5.75", "4.00", "1.50")
    assert row["layout_s"] == "0.00"
