"""exact=true at the doors: what it refuses, what it changes of a cell, how strict it is."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import check, kernel_check, kernels, metrics, terminal
from bench.cell import work
from bench.child import ArmJob, Child, Job
from bench.config import Config, parse, resolve
from bench.context import context
from bench.kernel_timing import Layer, Product
from bench.lossless import different
from bench.page import Group
from bench.record import Generation, Status, write_lines
from bench.report import tables
from bench.results import load
from bench.stats import Bootstrap
from methods.values import read_json
from quant.kernels.machine import Machine
from quant.kernels.table import read_table
from tests.bench.made_campaign import CELL, generation, pair_of_cells, write_cell
from tests.bench.test_kernels import planned as planned_kernels
from tests.bench.tiny import composed, generations, planned, write_world

BOOTSTRAP = Bootstrap(samples=100, confidence=0.95, seed=0)


@pytest.fixture
def world(tmp_path: Path) -> list[str]:
    return write_world(tmp_path)


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has a GPU: nothing here runs on it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def cell(world: Sequence[str], *overrides: str, door: str = "run") -> Config:
    asked = ["exact=true", "device=cuda", "dtype=float16", *world, *overrides]
    return parse(resolve(composed(*asked, door=door)))


def test_a_cpu_is_refused_before_anything_is_read(world: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        planned(world, "exact=true")
    assert str(refused.value) == "exact=true needs device=cuda, where attention is exact, got cpu"


@pytest.mark.usefixtures("_gpu")
def test_what_attention_is_exact_in_passes(world: list[str]) -> None:
    for dtype in ("float16", "bfloat16", "float32"):
        kernel_check.check_kernels(cell(world, f"dtype={dtype}"))
    kernel_check.check_kernels(cell(world, door="cost"))


@pytest.mark.usefixtures("_gpu")
def test_float64_is_refused(world: list[str]) -> None:
    told = "exact=true needs dtype=float32, float16 or bfloat16, .* got float64"
    with pytest.raises(ValueError, match=told):
        kernel_check.check_kernels(cell(world, "dtype=float64"))


@pytest.mark.usefixtures("_gpu")
def test_a_head_whose_size_is_no_power_of_2_is_refused(world: list[str], tmp_path: Path) -> None:
    path = tmp_path / "target" / "config.json"
    path.write_text(path.read_text().replace('"head_dim": 32', '"head_dim": 48'))
    with pytest.raises(ValueError, match=r"needs a head_dim that is a power of 2, got 48 in .*/ta"):
        kernel_check.check_kernels(cell(world))


@pytest.mark.usefixtures("_gpu")
def test_several_sequences_at_once_are_refused(world: list[str]) -> None:
    told = r"exact=true needs cost.batches=\[1\], for whose attention is exact, got \[1, 4\]"
    with pytest.raises(ValueError, match=told):
        kernel_check.check_kernels(cell(world, "cost.batches=[1,4]", door="cost"))


@pytest.mark.usefixtures("_gpu")
def test_quality_is_refused(world: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abc" * 40)
    text = [f"task.path={tmp_path / 'text.txt'}", "quality.window=32", "quality.stride=16"]
    own = [word for word in world if not word.startswith("task.path")]
    told = "exact must be false for quality, which reads a window at once, got true"
    with pytest.raises(ValueError, match=told):
        check.check_quality(cell(own, *text, door="quality"), 256)


@pytest.mark.usefixtures("_gpu")
def test_a_named_kernel_that_cannot_be_exact_is_refused(
    world: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_check, "lacking", lambda kernel, device: "")
    w4a16 = ["quant=w4a16", "quant.kernel=torch", "dtype=bfloat16"]
    told = r"quant: \S+ of K=128, N=\d+: kernel=torch needs 8-bit or dense weights for exact=true"
    with pytest.raises(ValueError, match=told):
        kernel_check.check_layers(cell(world, *w4a16), [])
    kernel_check.check_layers(cell(world, *w4a16, "exact=false"), [])
    kernel_check.check_layers(cell(world, "quant=w8a8", "quant.kernel=torch"), [])


@pytest.mark.usefixtures("_gpu")
def test_an_exact_cell_is_another_cell_in_name_label_and_hash(world: list[str]) -> None:
    cells = {}
    for exact in ("false", "true"):
        words = ["device=cuda", f"exact={exact}"]
        (block,) = planned(world, *words, "method=eagle2").blocks()
        cells[exact] = block.arms[1]
        assert block.name == f"lab.dense.lab.device=cuda.exact={exact}"
    plain, exact_ = cells["false"], cells["true"]
    assert exact_.name == "lab.dense.eagle2.lab.device=cuda.exact=true"
    assert (plain.cell.exact, exact_.cell.exact) == (False, True)
    assert plain.cell.config_hash != exact_.cell.config_hash
    assert exact_.config["exact"] is True


def test_a_context_says_whether_its_kernels_had_to_be_exact() -> None:
    assert context(torch.device("cpu"), [], {}, exact=True)["exact"] is True
    assert context(torch.device("cpu"), [], {}, exact=False)["exact"] is False


def run_exact(world: Sequence[str], *methods: str, only: str = "") -> dict[str, Path]:
    """Run a block in this process as if the device were a GPU: layers are exact, all on the CPU."""
    planner = planned(world, f"method={methods[-1]}")
    (block,) = planner.blocks()
    for arm in block.arms:
        arm.folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        ArmJob(folder=str(arm.folder), label=arm.cell.method, config={**arm.config, "exact": True})
        for arm in block.arms
        if only in ("", arm.cell.method)
    ]
    baseline = str(block.arms[0].folder)
    job = Job(name="b", arms=jobs, baseline=baseline, argv=["x"], progress=False)
    work(Child(job, block.campaign))
    return {arm.cell.method: arm.folder for arm in block.arms}


def test_equal_tokens_are_done_and_a_single_other_one_fails_the_cell(world: list[str]) -> None:
    world = [*world, "dtype=float64"]
    folders = run_exact(world, "vanilla", "eagle2")
    for folder in folders.values():
        assert read_json(folder / "status.json")["state"] == "done"
        assert read_json(folder / "context.json")["exact"] is True
    records = generations(folders["vanilla"])
    tokens = records[1].token_ids
    records[1] = replace(records[1], token_ids=[*tokens[:3], (tokens[3] + 1) % 96, *tokens[4:]])
    write_lines(folders["vanilla"] / "records.jsonl", records)
    (folders["eagle2"] / "records.jsonl").unlink()
    run_exact(world, "vanilla", "eagle2", only="eagle2")
    status = read_json(folders["eagle2"] / "status.json")
    assert (status["state"], status["reason"]) == (
        "failed",
        "exact=true: tokens must be vanilla's, got others in 1 of 4 turns, first in p1 turn 0 at "
        "token 3",
    )


def test_a_tie_is_no_excuse() -> None:
    equal = generation("a", [1, 2], 1.0)
    tie = replace(generation("b", [1, 7], 1.0, gap_nats=0.0), turn=1)
    unmeasured = generation("c", [1, 8], 1.0)
    assert different([equal]) == ""
    assert "in 1 of 2 turns, first in b turn 1 at token 1" in different([equal, tie])

    def pair(mine: Generation) -> tuple[Generation, Generation]:
        return mine, replace(equal, prompt_id=mine.prompt_id, turn=mine.turn)

    agreed = metrics.agreement([pair(equal), pair(tie), pair(unmeasured)], None)
    assert agreed is not None
    assert (agreed.num_equal, agreed.num_ties, agreed.num_differences) == (1, 0, 2)
    assert (agreed.num_unknown, agreed.verdict) == (0, "DIFFERENT")


def test_the_report_has_no_ties_where_all_is_exact(tmp_path: Path) -> None:
    folder = pair_of_cells(tmp_path)
    before = tables(load(folder), BOOTSTRAP).cells
    assert [row.lossless for row in before] == ["-", "ties"]
    for name, method in (("exact-vanilla", "vanilla"), ("exact-chain", "chain")):
        own = next(c for c in load(folder).cells if c.cell.method == method and not c.cell.exact)
        write_cell(folder / name, replace(own.cell, exact=True), own.generations)
    after = {row.cell: row for row in tables(load(folder), BOOTSTRAP).cells}
    assert after["dense-chain"].lossless == "ties"
    chain = after["exact-chain"]
    assert (chain.lossless, chain.num_ties, chain.num_differences) == ("DIFFERENT", 0, 1)
    assert "float32, exact, greedy" in Group(rows=[chain]).facts
    assert "cpu, float32, exact, greedy" in terminal.cell_table([chain])


def test_exact_cells_are_compared_with_exact_vanilla_alone(tmp_path: Path) -> None:
    own = generation("a", [1, 2], 1.0)
    write_cell(tmp_path / "vanilla", CELL, [own])
    write_cell(tmp_path / "chain", replace(CELL, method="chain", exact=True), [own])
    campaign = load(tmp_path)
    chain = next(c for c in campaign.runs if c.cell.method == "chain")
    assert campaign.vanilla_of(chain) is None
    write_cell(tmp_path / "exact", replace(CELL, exact=True), [own])
    campaign = load(tmp_path)
    vanilla = campaign.vanilla_of(chain)
    assert vanilla is not None
    assert vanilla.name == "exact"


def test_older_cells_are_not_exact(tmp_path: Path) -> None:
    folder = write_cell(tmp_path / "old", CELL, [], Status(state="done"))
    path = folder / "cell.json"
    assert '"exact": false' in path.read_text()
    path.write_text(path.read_text().replace(' "exact": false,\n', ""))
    assert load(tmp_path).cells[0].cell == CELL


def test_an_uneven_kernel_is_told_and_never_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(gpu="none", torch="1", triton=None, humming=None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "machine_of", lambda device: machine)
    job = planned_kernels()
    object.__setattr__(job.settings, "exact", True)
    rows = []
    for name, us, uneven in (("humming", 1.0, 4), ("triton", 9.0, 0)):
        product = Product(kernel=name, weight_bytes=1, times_us={1: [us], 4: [us]}, uneven=uneven)
        rows += kernels._rows(job, Layer(name="o", k=256, n=64), product, 4.2)
    assert not kernels._is_whole(rows, 1e-3)
    assert "error: humming gives a row of 4 other bits, not chosen" in capsys.readouterr().err
    kernels._keep(rows, job, torch.device("cpu"))
    best = {"w4a16-g128, exact": {"256x64": {"float16": "triton"}}}
    assert read_table(machine).best == best
