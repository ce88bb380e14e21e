"""The folder that `specquant quantize` writes is one that other doors read."""

import hashlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench import run
from bench.check import is_foreign
from bench.config import parse, resolve
from bench.shards import UNFINISHED
from methods.checkpoint import check_transformer, load_transformer, stored_in
from methods.weights import INDEX, read_config
from quant.stored import AsStored
from tests.bench.quantize.door import Door, folder_of
from tests.bench.tiny import LIMIT, composed, generations


def test_the_folder_is_read_by_quant_checkpoint(
    world: list[str], tmp_path: Path, door: Door
) -> None:
    code, told, _ = door(*world, f"out={tmp_path / 'out'}")
    assert code == 0
    assert re.search(r"^perplexity \S+, dense \S+ \(\d+ tokens of task=perplexity\)$", told, re.M)
    out = tmp_path / "out"
    check_transformer(out)
    assert stored_in(out, AsStored(), AsStored()).label == "w4a16-g32+gptq"
    assert (out / "tokenizer.json").is_file()
    assert not (out / UNFINISHED).exists()
    report = json.loads((out / "quality.json").read_text(encoding="utf-8"))
    assert len(report["layers"]) == 4 * 5
    assert all(0 < row["output_error"] < 0.1 for row in report["layers"])
    assert report["kl_nats_per_token"] > 0


def test_the_checkpoint_tells_what_it_was_calibrated_on(
    world: list[str], tmp_path: Path, door: Door
) -> None:
    door(*world, "seed=3", "calibration.samples=5", f"out={tmp_path / 'out'}")
    told = read_config(tmp_path / "out")["quantization_config"]["calibration"]
    file = tmp_path / "calibration.jsonl"
    assert told == {
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "samples": 5,
        "tokens": 200,
        "seed": 3,
    }


def test_the_end_names_the_command_that_runs_the_folder(
    world: list[str], tmp_path: Path, door: Door
) -> None:
    out = tmp_path / "a folder"
    _, told, _ = door(*world, "quality=null", f"out={out}")
    words = shlex.split(told.splitlines()[-1])
    assert words[:3] == ["specquant", "run", "model=lab"]
    assert {f"model.target={out}", "quant=checkpoint", "method=eagle2"} <= set(words)
    assert not any(word == f"model.target={folder_of(world)}" for word in words)
    composed(*words[2:])


@pytest.mark.parametrize("lacking", ["heads", "all"])
def test_the_end_names_a_method_whose_models_fit(
    world: list[str], tmp_path: Path, door: Door, lacking: str
) -> None:
    lab = [o for o in world if not o.startswith(("model.heads.", "model.small."))]
    # The lab's own heads, and its smaller model, are of another width and vocabulary.
    small = [o for o in world if o.startswith("model.small.")] if lacking == "heads" else []
    _, told, _ = door(*lab, *small, "quantizer=nearest", "quality=null", f"out={tmp_path / 'out'}")
    expected = {"heads": "chain", "all": "vanilla"}[lacking]
    assert f"method={expected}" in shlex.split(told.splitlines()[-1])


def test_a_column_that_holds_nothing_is_left_out(
    world: list[str], tmp_path: Path, door: Door
) -> None:
    _, told, _ = door(*world, "quantizer=nearest", "quality=null", f"out={tmp_path / 'out'}")
    assert told.splitlines()[0].split() == ["layer", "weight", "error"]


def test_a_quantised_lm_head_unties_the_ends(world: list[str], tmp_path: Path, door: Door) -> None:
    out = tmp_path / "out"
    code, _, _ = door(*world, "part=small", "quant.lm_head=w8a8", f"out={out}")
    assert code == 0
    assert read_config(folder_of(world, "model.small.target"))["tie_word_embeddings"] is True
    assert read_config(out)["tie_word_embeddings"] is False
    model = load_transformer(
        out, scheme=AsStored(), lm_head=AsStored(), dtype=torch.float32, device=torch.device("cpu")
    )
    assert type(model.lm_head).__name__ == "W8A8Linear"


def test_a_rotated_model_keeps_its_rotation_for_draft_heads(
    world: list[str], tmp_path: Path, door: Door
) -> None:
    out = tmp_path / "out"
    assert door(*world, "quantizer=gptq_rotated", f"out={out}")[0] == 0
    assert stored_in(out, AsStored(), AsStored()).label == "w4a16-g32+rotated+gptq"
    adapter = load_file(out / "rotation.safetensors")
    plain = load_file(folder_of(world) / "model.safetensors")
    assert torch.equal(adapter["norm"], plain["model.norm.weight"])
    turned = load_file(out / json.loads((out / INDEX).read_text())["weight_map"]["lm_head.weight"])
    restored = turned["model.embed_tokens.weight"] @ adapter["rotation"].T
    torch.testing.assert_close(restored, plain["model.embed_tokens.weight"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantizer", ["gptq", "gptq_rotated"])
def test_speculation_over_what_was_written_is_lossless(
    world: list[str],
    tmp_path: Path,
    door: Door,
    monkeypatch: pytest.MonkeyPatch,
    quantizer: str,
) -> None:
    out = tmp_path / "out"
    assert door(*world, f"quantizer={quantizer}", "quality=null", f"out={out}")[0] == 0
    models = [o for o in world if o.startswith("model.") and not o.startswith("model.target=")]
    line = [
        *models,
        f"model.target={out}",
        "quant=checkpoint",
        "method=eagle2",
        f"task.path={tmp_path / 'prompts.jsonl'}",
        f"task.max_new_tokens={LIMIT}",
        f"results_dir={tmp_path / 'results'}",
        "acceptance_floor=0",
        "dtype=float64",
    ]
    monkeypatch.setattr("sys.argv", ["specquant run", *line])
    assert run.main() == 0
    cells = {p.name.split(".")[-0] or p.name: p for p in (tmp_path / "results").glob("*/lab.*")}
    found = {
        p.name: [g.token_ids for g in generations(p)]
        for p in (tmp_path / "results" / "default").glob("lab.*")
    }
    assert len(found) == 2, cells
    one, other = found.values()
    assert one == other
    label = "w4a16-g32+gptq" if quantizer == "gptq" else "w4a16-g32+rotated+gptq"
    assert all(name.startswith(f"lab.{label}.") for name in found)


def test_dense_weights_beside_the_layers_are_kept_as_they_are(
    world: list[str], tmp_path: Path, door: Door
) -> None:
    out = tmp_path / "out"
    door(*world, "quality=null", f"out={out}")
    plain = load_file(folder_of(world) / "model.safetensors")
    index = json.loads((out / INDEX).read_text(encoding="utf-8"))["weight_map"]
    for name, tensor in plain.items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(load_file(out / index[name])[name], tensor)


def test_only_what_was_quantised_from_the_lab_is_the_labs(
    world: list[str], tmp_path: Path, door: Door
) -> None:
    texts = [o for o in world if not o.startswith("model.")]
    words = ["quantizer=nearest", "quality=null"]
    door(*texts, *words, f"out={tmp_path / 'lab'}")
    door(*world, *words, f"out={tmp_path / 'other'}")
    found = {
        name: is_foreign(parse(resolve(composed(f"model.target={tmp_path / name}"))))
        for name in ("lab", "other", "target")
    }
    assert found == {"lab": False, "other": True, "target": True}
    assert not is_foreign(parse(resolve(composed())))
