"""What `specquant quantize` refuses, and what it leaves untouched."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.shards import UNFINISHED
from tests.bench.quantize.door import Door, contents, folder_of
from tests.bench.tiny import write_tokenizer


def test_codes_without_a_word_in_config_json_are_no_dense_weights(
    world: list[str], tmp_path: Path, door: Door
) -> None:
    target = folder_of(world)
    tensors = load_file(target / "model.safetensors")
    for name in list(tensors):
        if name.endswith("_proj.weight"):
            scale = tensors[name].abs().amax(1) / 127
            tensors[name.replace("weight", "dequant_scale")] = scale.half()
            tensors[name] = (tensors[name] / scale[:, None]).round().to(torch.int8)
    save_file(tensors, target / "model.safetensors")
    code, _, told = door(*world, f"out={tmp_path / 'out'}")
    assert code == 2
    assert "layers must be dense to be quantised, got w8a8" in told


def test_shards_of_other_settings_are_not_mixed_in(
    world: list[str], tmp_path: Path, door: Door
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / UNFINISHED).write_text('{"identity": "other"}', encoding="utf-8")
    code, _, told = door(*world, f"out={out}")
    assert (code, told) == (2, f"error: {out} holds shards of other settings: give another out\n")


def test_a_full_folder_is_left_alone(world: list[str], tmp_path: Path, door: Door) -> None:
    target = folder_of(world)
    before = contents(target)
    code, _, told = door(*world, f"out={target}")
    assert (code, told) == (
        2,
        f"error: out must be a new, empty or unfinished folder, got {target}\n",
    )
    assert contents(target) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["quant=dense"], "scheme must be one of FP8, W4A16, "),
        (["model.calibration=null"], "model.calibration must be a file for w4a16-g32, got None"),
        (["quant.group_size=48"], "K must be a multiple of group_size=48, got K=128"),
        (["part=middle"], "part must be one of target, small, got 'middle'"),
        (["calibration.samples=0"], "calibration: samples must be 1 or more, got 0"),
        (["quantizer.rounding.damping=0"], "damping must be positive"),
        (
            ["quality.window=257"],
            "quality.window must be within the model's 256 positions, got 257",
        ),
        (
            ["quality.reference=models/lab/target"],
            "quality.reference must be null, since the dense",
        ),
        (["task.path=nowhere.jsonl"], "task perplexity: path must be a file, got "),
        (["task.path=LICENSE"], "a task's path must end in .jsonl, "),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(
    world: list[str], tmp_path: Path, door: Door, changes: list[str], message: str
) -> None:
    kept = [o for o in world if not (changes[0] == "quant=dense" and o.startswith("quant"))]
    code, _, told = door(*kept, *changes, f"out={tmp_path / 'out'}")
    assert code == 2
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert message in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [[], ["quantizer=nearest"], ["quality=null"]])
def test_texts_of_tokens_that_the_model_lacks_are_refused(
    world: list[str], tmp_path: Path, door: Door, changes: list[str]
) -> None:
    write_tokenizer(folder_of(world), ids_from=90)
    kept = [o for o in world if not (changes == ["quality=null"] and o.startswith("quality."))]
    code, _, told = door(*kept, *changes, f"out={tmp_path / 'out'}")
    assert code == 2
    assert "the tokenizer must give ids below vocab_size=96 for the text that is read" in told
    assert not (tmp_path / "out").exists()


def test_an_already_quantised_model_is_refused(
    world: list[str], tmp_path: Path, door: Door
) -> None:
    assert door(*world, f"out={tmp_path / 'once'}")[0] == 0
    again = [o for o in world if not o.startswith("model.target=")]
    code, _, told = door(*again, f"model.target={tmp_path / 'once'}", f"out={tmp_path / 'twice'}")
    assert code == 2
    assert "layers must be dense to be quantised" in told
