import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import preflight
from methods.values import read_json
from tests.bench.tiny import LIMIT, planned, write_tokenizer, write_world

Check = Callable[..., tuple[int, list[str]]]
SMALL = (f"task.max_new_tokens={LIMIT}", "threads=1")
TREE = ("method.depth=2", "method.top_k=3", "method.nodes=7")


@pytest.fixture
def world(tmp_path: Path) -> list[str]:
    return write_world(tmp_path)


@pytest.fixture
def check(
    world: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Check:
    """`specquant check` in this process: exit code, and the lines without the cells' names."""

    def call(*arguments: str) -> tuple[int, list[str]]:
        monkeypatch.setattr("sys.argv", ["specquant check", *world, *SMALL, *arguments])
        code = preflight.main()
        lines = capfd.readouterr().out.splitlines()
        return code, [line.strip() for line in lines if line.startswith("  ")]

    return call


def states(lines: list[str]) -> dict[str, str]:
    return {line.split(":")[0].split(maxsplit=1)[1]: line.split()[0] for line in lines}


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(read_json(path) | changes), encoding="utf-8")


def test_a_cell_without_a_fault_passes_every_check(check: Check) -> None:
    code, lines = check("method=eagle2", *TREE)
    assert states(lines) == dict.fromkeys(
        [
            "target",
            "weights",
            "kernels",
            "method",
            "layers",
            "tokenizer",
            "rotation",
            "calibration",
            "prompts",
            "memory",
            "loading",
            "quantised head",
            "acceptance",
        ],
        "ok",
    )
    assert code == 0


def test_a_broken_head_fails(check: Check) -> None:
    code, lines = check("method=eagle2", *TREE, "acceptance_floor=1000000")
    assert lines[-1].startswith("FAIL acceptance: broken head: acceptance length 1.")
    assert code == 1


def test_a_head_that_rounding_destroyed_fails(check: Check, tmp_path: Path) -> None:
    path = tmp_path / "target-eagle2" / "model.safetensors"
    tensors = load_file(path)
    # one outlier in each row takes the whole 4-bit range; the rest rounds to nothing
    tensors["fc.weight"][:, 0] = 1e4
    save_file(tensors, path)
    target = tmp_path / "target" / "model.safetensors"
    model = load_file(target)
    model["model.embed_tokens.weight"][:, 0] = 0  # which the outlier is multiplied by
    save_file(model, target)
    code, lines = check("method=eagle2", *TREE, "method.draft_scheme=w4a16_channel")
    assert states(lines)["quantised head"] == "FAIL"
    assert code == 1
    assert states(check("method=eagle2", *TREE)[1])["quantised head"] == "ok"


def test_a_head_that_does_not_fit_fails_before_anything_is_loaded(
    check: Check, tmp_path: Path
) -> None:
    edit_config(tmp_path / "target-eagle2", vocab_size=95)
    code, lines = check("method=eagle2")
    assert lines[-1].startswith("FAIL method: ")
    assert lines[-1].endswith("vocab_size must be the target's 96, got 95")
    assert code == 1


def test_a_smaller_model_of_another_tokenizer_fails(check: Check, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "small", first="0")
    code, lines = check("method=chain")
    assert states(lines)["tokenizer"] == "FAIL"
    assert "loading" not in states(lines)
    assert code == 1


def test_a_tokenizer_of_more_tokens_than_the_model_has_fails(check: Check, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "target", ids_from=26)  # "a" to "f" are 90 to 95
    assert check("method=vanilla")[0] == 0
    write_tokenizer(tmp_path / "target", ids_from=27)
    code, lines = check("method=vanilla")
    assert code == 1
    told = "the tokenizer must give ids below vocab_size=96 for the text that is read, got 96"
    assert f"FAIL prompts: {tmp_path / 'target'}: {told}" in lines


def test_other_special_tokens_are_told(check: Check, tmp_path: Path) -> None:
    edit_config(tmp_path / "small", eos_token_id=7)
    code, lines = check("method=chain")
    small = tmp_path / "small"
    assert f"warn special tokens: {small}: eos_token_id is 7, the target's 1" in lines
    assert code == 0


def test_a_heads_position_limit_is_told_and_does_not_fail(check: Check, tmp_path: Path) -> None:
    edit_config(tmp_path / "target-eagle2", max_position_embeddings=18)  # longest: 9 + 10
    code, lines = check("method=eagle2", *TREE)
    (told,) = [line for line in lines if line.startswith("warn positions: ")]
    assert "max_position_embeddings is 18, the task reaches 19 tokens" in told
    assert code == 0
    edit_config(tmp_path / "target-eagle2", max_position_embeddings=19)
    assert "positions" not in states(check("method=eagle2", *TREE)[1])


def test_a_target_that_may_be_rotated_is_told(check: Check, tmp_path: Path) -> None:
    path = tmp_path / "target" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(128)
    save_file(tensors, path)
    code, lines = check("method=eagle2", *TREE)
    assert states(lines)["rotation"] == "warn"
    assert code == 0


def test_every_cell_of_a_sweep_is_checked(check: Check) -> None:
    code, lines = check("-m", "method=vanilla,chain")
    assert [line.split()[1] for line in lines].count("target:") == 2
    assert code == 0


def test_a_run_notes_a_heads_position_limit(world: list[str], tmp_path: Path) -> None:
    edit_config(tmp_path / "target-eagle2", max_position_embeddings=18)
    planner = planned(world, "method=eagle2")
    planner.blocks()
    (note,) = planner.notes
    assert "max_position_embeddings is 18, the task reaches 19 tokens" in note


def test_a_target_that_is_only_called_the_labs_is_told(check: Check) -> None:
    _, lines = check()
    told = "weights: lab (but nothing shows that the target is the lab's), acceptance measured"
    assert any(line.endswith(told) for line in lines)
