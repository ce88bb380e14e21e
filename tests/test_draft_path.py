"""The tables of scripts/draft_path.py, from hand-written records."""

import csv
from dataclasses import replace
from pathlib import Path

from bench.build import ROOT
from bench.draft_vocab import read_ranking
from bench.record import Cost
from scripts.draft_path import LIST, write_tau, write_time
from tests.bench.made_campaign import CELL, CONTEXT, generation, write_cell

MODEL = replace(CELL, model="lab", task="lab", scheme="w4a16-g128")
EAGLE = replace(MODEL, method="eagle2", draft_scheme="dense")
CUT = replace(EAGLE, draft_scheme="w8a8+lm_head:w4a16-g128+vocab:draft_vocab-256")
LISTED = CONTEXT | {"draft_vocab": {"size": 256}}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_variant_stands_beside_the_plain_drafter_of_its_target(tmp_path: Path) -> None:
    ids = read_ranking(ROOT / LIST).ids
    inside, outside = ids[255], ids[256]
    text = [inside, inside, inside, outside]
    steps = {"vanilla": [0] * 4, "plain": [3], "cut": [1, 1]}
    for name, cell in (("vanilla", MODEL), ("plain", EAGLE), ("cut", CUT)):
        answers = [generation(p, text, 1.0, accepted=steps[name]) for p in "ab"]
        context = LISTED if name == "cut" else CONTEXT
        write_cell(tmp_path / "records" / name, cell, answers, context=context)
    write_tau(tmp_path)
    plain, cut = rows(tmp_path / "tau.csv")
    assert (plain["draft_scheme"], plain["draft_lm_head"], plain["draft_vocab"]) == (
        *("dense", "target", "all"),
    )
    assert (cut["draft_scheme"], cut["draft_lm_head"], cut["draft_vocab"]) == (
        *("w8a8", "w4a16-g128", "256"),
    )
    assert [row["tau"] for row in (plain, cut)] == ["4.0000", "2.0000"]
    assert [row["change"] for row in (plain, cut)] == ["0.0000", "-2.0000"]
    assert [row["in_list"] for row in (plain, cut)] == ["1.0000", "0.7500"]
    assert [row["verdict"] for row in (plain, cut)] == ["exact", "exact"]
    raw = rows(tmp_path / "steps.csv")
    assert [(row["a"], row["b"]) for row in raw] == [("4/1", "4/1"), ("4/2", "4/2")]


def cost(what: str, n: int, seconds: list[float]) -> Cost:
    return Cost(
        what=what,
        n=n,
        context=512,
        batch=1,
        forwards=6,
        repeat_s=seconds,
        weight_bytes=100,
        kv_bytes=0,
        flops=0,
    )


def test_a_proposal_stands_beside_the_targets_own_reads(tmp_path: Path) -> None:
    reads = [cost("verify", 60, [0.02] * 3), cost("verify", 1, [0.01] * 3)]
    for name, cell, records in (
        ("vanilla", MODEL, reads),
        ("cut", CUT, [cost("draft", 60, [0.003, 0.001, 0.002])]),
    ):
        own = replace(cell, door="cost", task="cost")
        write_cell(tmp_path / "records" / name, own, records, context=LISTED)
    write_time(tmp_path)
    (row,) = rows(tmp_path / "time.csv")
    assert (row["draft_vocab"], row["nodes"], row["weight_bytes"]) == ("256", "60", "100")
    assert [row[f"{name}_ms"] for name in ("median", "min", "max", "t1", "tv")] == [
        *("2.0000", "1.0000", "3.0000", "10.0000", "20.0000"),
    ]
