"""A stopped `specquant quantize` goes on, a finished one is left alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.shards import UNFINISHED
from tests.bench.quantize.door import Door, contents


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


def test_a_sweep_leaves_nothing_where_it_was_started(
    world: list[str], tmp_path: Path, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    outs = f"out={tmp_path / 'a'},{tmp_path / 'b'}"
    assert door(*world, "quantizer=nearest", "quality=null", outs, "-m")[0] == 0
    assert (tmp_path / "b" / "config.json").is_file()
    assert not list((tmp_path / "here").iterdir())
