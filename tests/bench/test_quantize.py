"""`specquant quantize`: a folder that other doors read, written part by part."""

import hashlib
import json
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import quantize, run
from bench.shards import UNFINISHED
from methods.checkpoint import check_transformer, load_transformer, stored_in
from methods.weights import INDEX, read_config
from quant.stored import AsStored
from tests.bench.tiny import LIMIT, composed, generations, write_tokenizer, write_world

Door = Callable[..., tuple[int, str, str]]
SETTINGS = (
    "quant=w4a16",
    "quant.group_size=32",
    "quant.range_search=false",
    "calibration.length=40",
    "quality.window=64",
    "quality.stride=32",
    "threads=1",
)


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Door:
    """`specquant quantize` in this process: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["specquant quantize", *arguments])
        code = quantize.main()
        told = capfd.readouterr()
        return code, told.out, told.err

    return call


@pytest.fixture
def world(tmp_path: Path) -> list[str]:
    """Overrides that point the door at a tiny family and its texts."""
    models = [o for o in write_world(tmp_path) if o.startswith("model.")]
    rows = [{"text": ("abcdefghij"[i:] * 30)[:60]} for i in range(8)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "calibration.jsonl").write_text(lines, encoding="utf-8")
    text = f"task.path={tmp_path / 'calibration.jsonl'}"
    return [*models, f"model.calibration={tmp_path / 'calibration.jsonl'}", text, *SETTINGS]


def folder_of(world: list[str], key: str = "model.target") -> Path:
    (found,) = [o.partition("=")[2] for o in world if o.startswith(f"{key}=")]
    return Path(found)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_folder_is_read_by_quant_checkpoint(
    world: list[str], tmp_path: Path, door: Door
) -> None:
    code, told, _ = door(*world, f"out={tmp_path / 'out'}")
    assert code == 0
    assert "perplexity" in told
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


def test_a_stopped_command_goes_on_and_ends_in_the_same_checkpoint(
    world: list[str], tmp_path: Path, door: Door
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert door(*world, f"out={whole}")[0] == 0
    assert door(*world, f"out={again}")[0] == 0
    kept = sorted(again.glob("model-*"))[:2]
    times = {path.name: path.stat().st_mtime_ns for path in kept}
    plan = {"identity": _identity(world, tmp_path, door)}
    for path in again.iterdir():
        if path not in kept:
            path.unlink()
    (again / UNFINISHED).write_text(json.dumps(plan), encoding="utf-8")
    assert door(*world, f"out={again}")[0] == 0
    assert contents(again).keys() == contents(whole).keys()
    for path in whole.iterdir():
        if path.suffix == ".safetensors":
            found, expected = load_file(again / path.name), load_file(path)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in found)
        else:
            assert (again / path.name).read_bytes() == path.read_bytes()
    assert {path.name: path.stat().st_mtime_ns for path in kept} == times


def _identity(world: list[str], tmp_path: Path, door: Door) -> str:
    """What a command that is stopped at once leaves as the identity of its work."""
    out = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.shards.Shards.write", _stop)
        with pytest.raises(_StoppedError):
            door(*world, f"out={out}")
    found: str = json.loads((out / UNFINISHED).read_text(encoding="utf-8"))["identity"]
    return found


class _StoppedError(Exception):
    pass


def _stop(*_: object) -> None:
    raise _StoppedError


def test_the_same_command_again_says_finished_and_leaves_all_as_it_is(
    world: list[str], tmp_path: Path, door: Door
) -> None:
    line = (*world, f"out={tmp_path / 'out'}")
    door(*line)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    code, told, problem = door(*line)
    assert (code, problem) == (0, "")
    assert f"{tmp_path / 'out'}: finished, nothing was left to do\n" in told
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("change", ["quality.limit=50", "gone"])
def test_a_finished_folder_is_measured_where_only_that_is_missing(
    world: list[str], tmp_path: Path, door: Door, change: str
) -> None:
    out = tmp_path / "out"
    door(*world, f"out={out}")
    layers = json.loads((out / "quality.json").read_text(encoding="utf-8"))["layers"]
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    (out / "quality.json").unlink() if change == "gone" else None
    code, told, _ = door(*world, f"out={out}", *([] if change == "gone" else [change]))
    report = json.loads((out / "quality.json").read_text(encoding="utf-8"))
    assert (code, report["layers"]) == (0, layers)
    assert report["tokens"] == (8 * 60 - 1 if change == "gone" else 49)
    assert f"{out}: done\n" in told
    assert {path: path.stat().st_mtime_ns for path in before} == before


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


def test_a_column_that_holds_nothing_is_left_out(
    world: list[str], tmp_path: Path, door: Door
) -> None:
    _, told, _ = door(*world, "quantizer=nearest", "quality=null", f"out={tmp_path / 'out'}")
    assert told.splitlines()[0].split() == ["layer", "weight", "error"]


def test_a_sweep_leaves_nothing_where_it_was_started(
    world: list[str], tmp_path: Path, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    outs = f"out={tmp_path / 'a'},{tmp_path / 'b'}"
    assert door(*world, "quantizer=nearest", "quality=null", outs, "-m")[0] == 0
    assert (tmp_path / "b" / "config.json").is_file()
    assert not list((tmp_path / "here").iterdir())


def test_a_torn_shard_is_written_again(world: list[str], tmp_path: Path, door: Door) -> None:
    out = tmp_path / "out"
    assert door(*world, f"out={out}")[0] == 0
    shard = out / "model-00002-of-00006.safetensors"
    whole = {name: tensor.clone() for name, tensor in load_file(shard).items()}
    shard.write_bytes(shard.read_bytes()[:100])
    plan = {"identity": _identity(world, tmp_path, door)}
    (out / UNFINISHED).write_text(json.dumps(plan), encoding="utf-8")
    assert door(*world, f"out={out}")[0] == 0
    again = load_file(shard)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("where", ["bench.quantize.beside_dense", "bench.quantizer.write_tensors"])
def test_whatever_comes_last_a_stopped_command_goes_on(
    world: list[str], tmp_path: Path, door: Door, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    line = (*world, "quantizer=gptq_rotated", f"out={tmp_path / 'out'}")
    with monkeypatch.context() as patch:
        patch.setattr(where, _stop)
        with pytest.raises(_StoppedError):
            door(*line)
    assert door(*line)[0] == 0
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"rotation.safetensors", "quality.json", "config.json"} <= left
    assert UNFINISHED not in left


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


@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="needs the extra `quantize`")
@pytest.mark.parametrize(
    ("quantizer", "scheme", "label"),
    [("gptqmodel", "w4a16", "w4a16-g32+gptq"), ("awq", "w4a16_asym", "w4a16-g32-asym+awq")],
)
def test_gptqmodel_writes_a_folder_that_reads_as_asked(
    world: list[str], tmp_path: Path, door: Door, quantizer: str, scheme: str, label: str
) -> None:
    out = tmp_path / "out"
    kept = [o for o in world if o != "quant=w4a16"]
    code, _, told = door(*kept, f"quant={scheme}", f"quantizer={quantizer}", f"out={out}")
    assert (code, told) == (0, "")
    assert stored_in(out, AsStored(), AsStored()).label == label
    assert read_config(out)["specquant"]["calibration"]["samples"] == 8
    report = json.loads((out / "quality.json").read_text(encoding="utf-8"))
    errors = [row["output_error"] for row in report["layers"]]  # of the stream: they add up
    assert len(errors) == 5
    assert 0 < errors[0] < 0.1
    assert errors == sorted(errors)
    assert not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["quant=w8a8"], "GPTQModel's gptq must write W4A16 or W8A16, got w8a8"),
        (["quant=w4a16", "quant.lm_head=w8a8"], "quant.lm_head must be checkpoint with a toolkit"),
    ],
)
@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="needs the extra `quantize`")
def test_what_gptqmodel_does_not_write_is_refused(
    world: list[str], tmp_path: Path, door: Door, changes: list[str], message: str
) -> None:
    kept = [o for o in world if not o.startswith("quant")]
    code, _, told = door(*kept, *changes, "quantizer=gptqmodel", f"out={tmp_path / 'out'}")
    assert code == 2
    assert message in told
