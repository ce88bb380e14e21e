"""A model of random weights through the doors: planned, checked, run and labelled."""

import json
from pathlib import Path

import pytest

from bench.block import run_block
from bench.config import parse, resolve
from bench.load import load_tokenizer
from bench.plan import Planner
from bench.preflight import FAILED, inspect
from bench.record import Cell, Generation
from bench.replayed import missed
from bench.report import main as report
from bench.task import load
from methods.replay import Constant, Measured
from methods.values import read_json
from tests.bench.tiny import composed, generations
from tests.family import VOCAB
from tests.made_up import write_random_family

NAMES = {"model": "llama3_8b", "quant": "dense", "task": "random", "accept": "constant"}
EAGLE = ("method=eagle2", "method.top_k=4", "method.nodes=24")


@pytest.fixture
def world(tmp_path: Path) -> list[str]:
    write_random_family(tmp_path)
    return [
        "model=llama3_8b",
        "task=random",
        f"model.target={tmp_path / 'target'}",
        f"model.heads.eagle2={tmp_path / 'target-eagle2'}",
        f"task.draw_below={VOCAB}",
        "task.draw_lengths=[12,20,9,30]",
        "task.max_new_tokens=60",
        f"results_dir={tmp_path / 'results'}",
        "campaign=c",
    ]


def plan(world: list[str], *overrides: str, method: str = "eagle2") -> Planner:
    planner = Planner("bench.cell")
    config = composed(*world, *overrides)
    planner.add(config, names=NAMES | {"method": method}, overrides=list(overrides))
    return planner


def test_drawn_prompts_are_as_long_as_asked_and_the_same_every_time(
    world: list[str], tmp_path: Path
) -> None:
    config = parse(resolve(composed(*world)))
    tokenizer = load_tokenizer(tmp_path / "target")
    ids = [tokenizer(prompt.turns[0])["input_ids"] for prompt in load(config.task)]
    assert [len(text) for text in ids] == [12, 20, 9, 30]
    assert load(config.task) == load(parse(resolve(composed(*world))).task)
    assert tokenizer.decode(ids[0]) == load(config.task)[0].turns[0]


def test_a_replay_is_recorded_as_one_and_meets_its_tokens_per_step(
    world: list[str], tmp_path: Path
) -> None:
    (block,) = plan(world, *EAGLE, "accept=constant", "accept.tau=3").blocks()
    ended = run_block(block, module="bench.cell", argv=[], progress=False)
    assert {status.state for status in ended.values()} == {"done"}
    cells = {
        cell.method.partition("[")[0]: (cell, folder)
        for folder in (tmp_path / "results" / "c").iterdir()
        if (folder / "cell.json").exists()
        for cell in [Cell.parse(read_json(folder / "cell.json"))]
    }
    assert {name: cell.acceptance for name, (cell, _) in cells.items()} == {
        "eagle2": "replay:constant(tau=3)",
        "vanilla": "measured",
    }
    assert {cell.weights for cell, _ in cells.values()} == {"random"}
    assert all("random_weights.json" in str(cell.weight_hashes) for cell, _ in cells.values())
    answers = generations(cells["eagle2"][1])
    assert all(answer.divergence is None for answer in answers)
    assert [len(answer.token_ids) for answer in answers] == [60] * 4


def test_a_report_says_that_acceptance_was_replayed(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = plan(world, *EAGLE, "accept=constant", "accept.tau=3").blocks()
    run_block(block, module="bench.cell", argv=[], progress=False)
    words = ["report", "campaign=c", f"results_dir={tmp_path / 'results'}", "formats=[md]"]
    monkeypatch.setattr("sys.argv", words)
    assert report() == 0
    page = (tmp_path / "results" / "c" / "report" / "report.md").read_text(encoding="utf-8")
    assert "Acceptance is not measured but replay:constant(tau=3)" in page
    assert "Weights are random" in page


def answers(accepted: list[int]) -> list[Generation]:
    return [
        Generation(
            prompt_id="p",
            turn=0,
            category="c",
            status="ok",
            prompt_tokens=1,
            accepted=accepted,
            drafted=[5] * len(accepted),
        )
    ]


def test_a_replay_that_misses_its_tokens_per_step_is_told() -> None:
    profile = Constant(name="k", source="s", tau=3.0, small=Measured())
    assert missed(profile, answers([1, 2, 3] * 20)) == ""
    assert "must be 3 as k says, got 2.500" in missed(profile, answers([1, 2] * 30))
    assert missed(Measured(), answers([0] * 60)) == ""


def test_a_shape_says_that_its_weights_are_random(world: list[str]) -> None:
    with pytest.raises(ValueError, match=r"model\.weights must be random"):
        plan([*world, "model.weights=checkpoint"], "method=vanilla", method="vanilla")


def test_random_weights_take_drawn_tokens_alone(world: list[str]) -> None:
    with pytest.raises(ValueError, match="task must draw tokens below 96"):
        plan(["task=lab", *(w for w in world if not w.startswith("task"))], method="vanilla")


def test_two_models_need_two_profiles(world: list[str], tmp_path: Path) -> None:
    planner = plan(
        [
            *world,
            f"+model.small.target={tmp_path / 'small'}",
            f"+model.small.heads.eagle2={tmp_path / 'small-eagle2'}",
            "method=hierarchical",
            "method.inner.top_k=4",
            "method.inner.nodes=20",
            "accept=constant",
            "baseline=false",
        ],
        method="hierarchical",
    )
    with pytest.raises(ValueError, match=r"accept\.small must be a profile"):
        planner.blocks()


@pytest.mark.parametrize("quant", ["dense", "w8a8_smooth"])
def test_a_check_passes_without_a_tokenizer_or_a_text(world: list[str], quant: str) -> None:
    config = parse(resolve(composed(*world, *EAGLE, f"quant={quant}", "accept=constant")))
    found = list(inspect(config))
    assert [f for f in found if f.state == FAILED] == []
    assert "random, acceptance replay:constant" in next(
        f.detail for f in found if f.what == "weights"
    )


def test_another_seed_is_another_cell(world: list[str], tmp_path: Path) -> None:
    before = plan(world, method="vanilla").blocks()[0].arms[0].cell.weight_hashes
    draw = tmp_path / "target" / "random_weights.json"
    draw.write_text(json.dumps({"seed": 99, "holds": "transformer"}), encoding="utf-8")
    assert plan(world, method="vanilla").blocks()[0].arms[0].cell.weight_hashes != before
