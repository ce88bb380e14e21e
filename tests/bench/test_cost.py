"""`specquant cost` from the command line's words to records, on a tiny family."""

from pathlib import Path

import pytest

from bench import cost, cost_cell
from bench.block import read_status
from bench.child import ArmJob, Child, Job
from bench.plan import Planner
from bench.record import Cell, Cost, read_lines
from methods.values import read_json
from tests.bench.counters import Paced
from tests.bench.tiny import composed, write_world

WORDS = (
    "cost.widths=[1,5,9]",
    "cost.contexts=[20,40]",
    "cost.repeats=3",
    "cost.warmup=1",
    "threads=1",
)
NAMES = {"model": "lab", "quant": "w8a8", "method": "vanilla", "task": "lab"}


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    world = write_world(tmp_path_factory.mktemp("world"))
    planner = Planner(cost.CHILD)
    for method in ("chain", "eagle2"):
        words = ["quant=w8a8", f"method={method}", *WORDS]
        config = composed(*world, *words, door="cost")
        planner.add(config, names=NAMES | {"method": method}, overrides=words)
    return planner


def test_a_block_times_the_target_and_every_drafter(planner: Planner) -> None:
    (block,) = planner.blocks()
    assert [arm.cell.method for arm in block.arms] == ["vanilla", "chain", "eagle2"]
    for arm in block.arms:
        arm.folder.mkdir(parents=True)
    jobs = [
        ArmJob(folder=str(arm.folder), label=arm.cell.method, config=arm.config)
        for arm in block.arms
    ]
    job = Job(name="b", arms=jobs, baseline="", argv=["x"], progress=False)
    cost_cell.work(Child(job, block.campaign))
    taken = {
        arm.cell.method: [Cost.parse(line) for line in read_lines(arm.folder / "records.jsonl")]
        for arm in block.arms
    }
    points = [(c.what, c.n, c.context) for c in taken["vanilla"]]
    assert points == [("verify", n, context) for context in (20, 40) for n in (1, 5, 9)]
    assert [(c.what, c.n, c.context) for c in taken["chain"]] == [
        ("draft", 8, 20),
        ("draft", 8, 40),
    ]
    assert [c.forwards for c in taken["eagle2"]] == [6, 6]
    assert all(len(c.repeat_s) == 3 for costs in taken.values() for c in costs)
    for arm in block.arms:
        status = read_status(arm.folder)
        assert status is not None
        assert status.state == "done"
        told = read_json(arm.folder / "context.json")
        assert told["device"]["type"] == "cpu"
        assert {"imports", "weights", "building", "captures"} < told["start_s"].keys()


def test_every_case_is_held_where_energy_is_asked_for(tmp_path: Path) -> None:
    planner = Planner(cost.CHILD)
    words = ["quant=w8a8", "method=chain", *WORDS]
    config = composed(*write_world(tmp_path), *words, door="cost")
    planner.add(config, names=NAMES | {"method": "chain"}, overrides=words)
    (block,) = planner.blocks()
    jobs = []
    for arm in block.arms:
        arm.folder.mkdir(parents=True)
        held = {**arm.config, "cost": {**arm.config["cost"], "hold_s": 0.5}}
        jobs.append(ArmJob(folder=str(arm.folder), label=arm.cell.method, config=held))
    job = Job(name="b", arms=jobs, baseline="", argv=["x"], progress=False)
    counter = Paced(watts=300, period_s=0.01)
    cost_cell.work(Child(job, block.campaign), find=lambda device: counter)
    reads, drafts = (
        [Cost.parse(line) for line in read_lines(arm.folder / "records.jsonl")]
        for arm in block.arms
    )
    points = [(c.n, c.context) for c in reads]
    assert points == [(n, context) for context in (20, 40) for n in (1, 5, 9)]
    assert [c.context for c in drafts] == [20, 40]
    for record in (*reads, *drafts):
        assert len(record.repeat_s) == 3
        assert record.energy_mj is not None
        assert record.held_ms is not None
        assert record.energy_mj / record.held_ms == pytest.approx(300, rel=0.3)
        assert (record.sm_mhz, record.power_capped) == (1410, True)


def test_records_from_before_energy_was_measured_are_read() -> None:
    line = {
        **{"schema": 1, "what": "verify", "n": 1, "context": 20, "batch": 1, "forwards": 1},
        **{"repeat_s": [0.1, 0.2], "weight_bytes": 1, "kv_bytes": 1, "flops": 1},
    }
    assert Cost.parse(line).energy_mj is None


def test_the_door_shows_what_it_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    line = [*write_world(tmp_path), *WORDS, "quant=w8a8", "method=chain"]
    monkeypatch.setattr("sys.argv", ["specquant cost", *line])
    assert cost.main() == 0
    told = capfd.readouterr().out
    for context in (20, 40):
        assert f"T_v(n) / T_1 of n tokens after {context}, batch 1:" in told
        assert f"A proposal of n tokens after {context}:" in told
    assert told.splitlines()[-1] == f"results: {tmp_path / 'results' / 'c'}"


def test_the_defaults_fit_the_lab_model() -> None:
    planner = Planner(cost.CHILD)
    planner.add(composed(door="cost"), names=NAMES | {"quant": "dense"}, overrides=[])
    (block,) = planner.blocks()
    assert block.arms[0].config["cost"]["contexts"] == [256, 1024]


def test_cells_of_the_cost_door_are_named_by_it(planner: Planner) -> None:
    (block,) = planner.blocks()
    cells: list[Cell] = [arm.cell for arm in block.arms]
    assert {(c.door, c.task) for c in cells} == {("cost", "cost")}
    assert all(".cost." in arm.folder.name for arm in block.arms)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("cost.widths=[]", "cost: widths must be distinct numbers from 1 on, got \\[\\]"),
        ("cost.widths=[4,4]", "widths must be distinct"),
        ("cost.contexts=[12]", "contexts must be above repeats x catch_up = 12, got 12"),
        ("cost.contexts=[250]", "within the model's 256 positions together, got 259"),
        ("context=39", "cost.contexts must be within context=39, got 40"),
        ("cost.repeats=1", "repeats must be 2 or more, got 1"),
        ("cost.repeats=many", "cost.repeats"),
        ("cost.hold_s=-1", "cost: hold_s must be 0, or 0.5 to 60, got -1"),
        ("cost.hold_s=nan", "hold_s must be 0, or 0.5 to 60, got nan"),
        ("cost.hold_s=0.1", "hold_s must be 0, or 0.5 to 60, got 0.1"),
        ("cost.hold_s=long", "cost.hold_s"),
        ("cost.hold_s=1", "^cost.hold_s needs device=cuda, .* got cpu; cost.hold_s=0 works$"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    tmp_path_factory: pytest.TempPathFactory, word: str, message: str
) -> None:
    world = write_world(tmp_path_factory.mktemp("world"))
    config = composed(*world, *WORDS, word, door="cost")
    with pytest.raises(ValueError, match=message):
        Planner(cost.CHILD).add(config, names=NAMES, overrides=[*WORDS, word])
