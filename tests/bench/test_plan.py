import json
from pathlib import Path

import pytest

from bench.plan import Planner
from bench.record import write_json
from tests.bench.tiny import planned, write_tokenizer, write_world


@pytest.fixture
def world(tmp_path: Path) -> list[str]:
    return write_world(tmp_path)


def refusal(world: list[str], *overrides: str) -> str:
    with pytest.raises(ValueError) as refused:
        planned(world, *overrides).blocks()
    return str(refused.value)


def test_cells_of_one_target_are_one_block_with_vanilla_first(world: list[str]) -> None:
    planner = Planner("bench.cell")
    for quant in ("dense", "w4a16"):
        for method in ("eagle2", "vanilla", "chain"):
            planned(world, f"quant={quant}", f"method={method}", planner=planner)
    blocks = planner.blocks()
    assert [[arm.name for arm in block.arms] for block in blocks] == [
        ["lab.dense.vanilla.lab", "lab.dense.eagle2.lab", "lab.dense.chain.lab"],
        ["lab.w4a16.vanilla.lab", "lab.w4a16.eagle2.lab", "lab.w4a16.chain.lab"],
    ]
    assert [block.name for block in blocks] == ["lab.dense.lab", "lab.w4a16.lab"]
    assert [block.baseline for block in blocks] == [block.arms[0].name for block in blocks]


def test_another_seed_is_another_block(world: list[str]) -> None:
    planner = planned(world, "seed=1")
    assert len(planned(world, "seed=2", planner=planner).blocks()) == 2


def test_a_method_brings_its_baseline(world: list[str]) -> None:
    (block,) = planned(world, "method=eagle2").blocks()
    assert [arm.cell.method for arm in block.arms] == ["vanilla", "eagle2"]
    (block,) = planned(world, "method=eagle2", "baseline=false").blocks()
    assert [arm.cell.method for arm in block.arms] == ["eagle2"]
    assert block.baseline is None


def test_a_baseline_is_the_vanilla_cell_itself(world: list[str]) -> None:
    (asked,) = planned(world, "method=vanilla").blocks()
    (brought,) = planned(world, "method=eagle2", "method.depth=4").blocks()
    assert brought.arms[0] == asked.arms[0]


def test_overrides_name_folder_and_label(world: list[str]) -> None:
    (block,) = planned(world, "quant=w4a16", "method=eagle2", "method.depth=3", "seed=1").blocks()
    arm = block.arms[1]
    assert arm.name == "lab.w4a16.eagle2.lab.method.depth=3.seed=1"
    assert arm.cell.method == "eagle2[depth=3]"
    assert block.arms[0].name == "lab.w4a16.vanilla.lab.seed=1"


def test_a_drafters_scheme_is_a_column_of_its_own(world: list[str]) -> None:
    chosen = ("method=eagle2", "method.draft_scheme=w8a8", "method.draft_lm_head=w4a16")
    (block,) = planned(world, *chosen).blocks()
    vanilla, eagle2 = block.arms
    assert (vanilla.cell.draft_scheme, vanilla.name) == ("", "lab.dense.vanilla.lab")
    assert eagle2.cell.draft_scheme == "w8a8+lm_head:w4a16-g128"
    assert eagle2.cell.method == "eagle2"


def test_what_drafts_nothing_has_no_draft_scheme(world: list[str]) -> None:
    (plain,) = planned(world, "method=vanilla").blocks()
    (other,) = planned(world, "method=vanilla", "method.draft_scheme=w8a8").blocks()
    assert other.arms == plain.arms


def test_the_scheme_of_lm_head_is_read_by_name(world: list[str]) -> None:
    (block,) = planned(world, "quant.lm_head=w8a8").blocks()
    assert block.arms[0].cell.lm_head == "w8a8"
    assert block.arms[0].config["quant"]["lm_head"]["_target_"] == "quant.w8a8.W8A8"


def test_every_file_that_is_read_is_hashed(world: list[str]) -> None:
    (block,) = planned(world, "method=hierarchical").blocks()
    folders = {name.split("/")[-2] for name in block.arms[1].cell.weight_hashes}
    assert folders == {"target", "small", "small-eagle2"}


def test_smoothing_reads_calibration_text(world: list[str], tmp_path: Path) -> None:
    refused = refusal(world, "quant=w8a8_smooth", f"model.calibration={tmp_path / 'none'}")
    assert refused.startswith("model.calibration must be a file for w8a8-smooth, got ")
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "abc"}) + "\n", encoding="utf-8")
    (block,) = planned(world, "quant=w8a8_smooth", f"model.calibration={text}").blocks()
    assert any(name.endswith("text.jsonl") for name in block.arms[0].cell.weight_hashes)


def test_edited_prompts_are_another_configuration(world: list[str], tmp_path: Path) -> None:
    (before,) = planned(world).blocks()
    row = json.dumps({"prompt_id": "p9", "text": "abc"})
    (tmp_path / "prompts.jsonl").write_text(row + "\n", encoding="utf-8")
    (after,) = planned(world).blocks()
    assert before.arms[0].cell.config_hash != after.arms[0].cell.config_hash


def test_one_name_for_two_cells_is_refused(world: list[str]) -> None:
    planner = planned(world)
    with pytest.raises(ValueError, match="two different cells would lie in"):
        planned([*world, "temperature=1"], planner=planner)


def test_a_method_that_does_not_fit_is_a_problem_of_its_cell(world: list[str]) -> None:
    world = [*world, "model.small=null"]
    planner = planned(world, "method=chain")
    planned(world, "method=eagle2", "method.top_k=97", planner=planner)
    planned(world, "method=eagle3", planner=planner)
    problems = {a.cell.method: a.problem for block in planner.blocks() for a in block.arms}
    assert "must have a smaller model" in problems["chain"]
    assert (
        "top_k must be within the head's vocabulary of 96, got 97" in problems["eagle2[top_k=97]"]
    )
    assert problems["eagle3"] == problems["vanilla"] == ""


def test_a_cell_that_cannot_run_alone_is_refused(world: list[str]) -> None:
    assert "must have a smaller model" in refusal(world, "method=chain", "model.small=null")


def test_a_smaller_model_of_another_vocabulary_is_refused(world: list[str], tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "small", first="0")
    small, target = tmp_path / "small", tmp_path / "target"
    assert refusal(world, "method=chain") == f"{small}: the vocabulary must be that of {target}"


def test_a_head_of_another_vocabulary_is_refused(world: list[str], tmp_path: Path) -> None:
    path = tmp_path / "target-eagle2" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"vocab_size": 95}
    path.write_text(json.dumps(config), encoding="utf-8")
    assert "vocab_size must be the target's 96, got 95" in refusal(world, "method=eagle2")


@pytest.mark.parametrize("name", ["target", "target-eagle2", "small"])
def test_a_truncated_checkpoint_stops_the_sweep(
    world: list[str], tmp_path: Path, name: str
) -> None:
    path = tmp_path / name / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    method = "chain" if name == "small" else "eagle2"
    planner = Planner("bench.cell")
    with pytest.raises(ValueError, match=rf"{path} must be a whole safetensors file"):
        planned(world, f"method={method}", planner=planner)


def test_a_missing_checkpoint_is_named(world: list[str], tmp_path: Path) -> None:
    refused = refusal(world, f"model.target={tmp_path / 'none'}")
    folder = tmp_path / "none"
    assert refused == (
        "model.target must be a checkpoint folder or a hub id, org/name or org/name@revision, got "
        f"'{folder}': {folder} is no folder"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("context=257", "context must be within the model's 256 positions, got 257"),
        ("device=tpu", "device must be cpu, cuda or cuda:<index>, got 'tpu'"),
        ("dtype=int8", "dtype must be one of float32, float64, bfloat16, float16, got 'int8'"),
        ("temperature=warm", "temperature: Value 'warm' of type 'str' could not be converted"),
        ("threads=0", "threads must be 1 to "),
        ("threads=100000", "threads must be 1 to "),
        ("campaign=../x", "campaign must be a folder of results_dir, got '../x'"),
        ("model.weights=mine", "model: weights must be one of lab, checkpoint, random, got 'mine'"),
        ("quant.lm_head=w9", "quant.lm_head must be one of checkpoint, dense, "),
        ("method.draft_scheme=null", "method.draft_scheme must be one of checkpoint, dense, "),
        ("task.path=none.jsonl", "task lab: path must be a file"),
        ("+extra=1", "extra: no such key, there are campaign, results_dir"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(world: list[str], override: str, message: str) -> None:
    refused = refusal(world, override)
    assert refused.startswith(message)
    assert "\n" not in refused


def test_no_prompt_within_the_context_is_refused(world: list[str]) -> None:
    refused = refusal(world, "context=12", "task.max_new_tokens=10")
    assert refused == (
        "task lab: a prompt and its 10 new tokens must be within the context of 12, "
        "got 3 tokens in the shortest prompt"
    )


def test_some_prompts_beyond_the_context_are_announced(world: list[str]) -> None:
    planner = planned(world, "context=15")  # prompts of 3, 6, 5 and 9 tokens, 10 new ones
    planner.blocks()
    assert planner.notes == [
        "task lab: 2 of 4 prompts are too long for the context of 15; they are recorded as too_long"
    ]


def test_results_of_another_schema_are_refused(world: list[str], tmp_path: Path) -> None:
    path = tmp_path / "results" / "c" / "old" / "cell.json"
    path.parent.mkdir(parents=True)
    write_json(path, {"schema": 99})
    assert refusal(world) == f"{path}: schema must be 1, got 99"
