import fcntl
import os
from pathlib import Path
from threading import Thread

import pytest

from bench.block import Arm, Block, check_schema, is_finished, run_block
from bench.record import Cell, Status, write_json
from methods.values import read_json

CHILD = "tests.bench.fake_child"
LABELS = {
    "door": "run",
    "model": "m",
    "weights": "lab",
    "scheme": "dense",
    "lm_head": "dense",
    "draft_scheme": "",
    "task": "t",
    "device": "cpu",
    "dtype": "float32",
}


def arm(
    root: Path, name: str, *, config_hash: str = "1", problem: str = "", **config: object
) -> Arm:
    return Arm(
        folder=root / "results" / "c" / name,
        cell=Cell(method=name, config_hash=config_hash, **LABELS),  # type: ignore[arg-type]
        config={"how": "done"} | config,
        problem=problem,
    )


def run(root: Path, *arms: Arm) -> dict[str, Status]:
    block = Block(
        name="b",
        results_dir=root / "results",
        campaign=root / "results" / "c",
        arms=arms,
        baseline=None,
    )
    return run_block(block, module=CHILD, argv=["x"], progress=False)


def num_runs(arm: Arm) -> int:
    """Processes that had the arm among theirs."""
    path = arm.folder / "runs"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


@pytest.mark.parametrize(
    ("how", "state", "reason"),
    [
        ("exit", "failed", "exit code 7 at p0 turn 0"),
        ("quiet", "failed", "exit code 0 at p0 turn 0"),
        ("kill", "failed", "SIGKILL at p0 turn 0"),
        ("segv", "failed", "SIGSEGV at p0 turn 0"),
        ("memory", "oom", "out of memory"),
        ("value", "unsupported", "top_k must be small"),
        ("wrong", "failed", "KeyError: 'lost'"),
    ],
)
def test_what_kills_an_arm_is_its_status_and_the_others_go_on(
    tmp_path: Path, how: str, state: str, reason: str
) -> None:
    bad = arm(tmp_path, "bad", how=how)
    good = [arm(tmp_path, "first"), arm(tmp_path, "last")]
    ended = run(tmp_path, good[0], bad, good[1])
    assert {name: status.state for name, status in ended.items()} == {
        "first": "done",
        "bad": state,
        "last": "done",
    }
    assert reason in ended["bad"].reason
    assert [num_runs(bad), num_runs(good[0])] == [1, 2]


def test_a_crash_keeps_where_it_happened(tmp_path: Path) -> None:
    ended = run(tmp_path, arm(tmp_path, "bad", how="segv"))
    assert "fake_child.py" in ended["bad"].traceback


def test_a_failure_keeps_its_traceback(tmp_path: Path) -> None:
    ended = run(tmp_path, arm(tmp_path, "bad", how="wrong"))
    assert "fake_child.py" in ended["bad"].traceback


def test_a_death_before_any_arm_is_everybodys(tmp_path: Path) -> None:
    ended = run(tmp_path, arm(tmp_path, "a", before=True), arm(tmp_path, "b"))
    assert [status.state for status in ended.values()] == ["failed", "failed"]
    assert "exit code 9" in ended["b"].reason


def test_a_cell_that_cannot_run_is_recorded_and_not_run(tmp_path: Path) -> None:
    bad = arm(tmp_path, "chain", problem="there is no smaller model")
    ended = run(tmp_path, arm(tmp_path, "vanilla"), bad)
    assert ended["chain"] == Status(state="unsupported", reason="there is no smaller model")
    assert num_runs(bad) == 0
    assert read_json(bad.folder / "cell.json")["method"] == "chain"


def test_a_finished_cell_is_left_alone(tmp_path: Path) -> None:
    old, new = arm(tmp_path, "old"), arm(tmp_path, "new")
    run(tmp_path, old)
    ended = run(tmp_path, old, new)
    assert [status.state for status in ended.values()] == ["done", "done"]
    assert [num_runs(old), num_runs(new)] == [1, 1]
    assert is_finished(old)


def test_a_failed_cell_runs_again(tmp_path: Path) -> None:
    run(tmp_path, arm(tmp_path, "a", how="exit"))
    assert run(tmp_path, arm(tmp_path, "a"))["a"].state == "done"


def test_a_stale_cell_is_moved_aside_and_runs_again(tmp_path: Path) -> None:
    for number in range(3):
        changed = arm(tmp_path, "a", config_hash=str(number))
        assert not is_finished(changed)
        run(tmp_path, changed)
        assert num_runs(changed) == 1
    aside = tmp_path / "results" / ".stale" / "c"
    assert sorted(path.name for path in aside.iterdir()) == ["a.1", "a.2"]
    assert read_json(aside / "a.1" / "cell.json")["config_hash"] == "0"


def test_labels_of_a_finished_cell_follow_the_plan(tmp_path: Path) -> None:
    run(tmp_path, arm(tmp_path, "a"))
    relabelled = arm(tmp_path, "a")
    relabelled = Arm(
        folder=relabelled.folder,
        cell=Cell(method="a", config_hash="1", tie_threshold_nats=0.5, **LABELS),  # type: ignore[arg-type]
        config=relabelled.config,
    )
    run(tmp_path, relabelled)
    assert num_runs(relabelled) == 1
    assert read_json(relabelled.folder / "cell.json")["tie_threshold_nats"] == 0.5


def test_results_of_another_schema_are_refused_by_name(tmp_path: Path) -> None:
    cell = tmp_path / "c" / "a" / "cell.json"
    cell.parent.mkdir(parents=True)
    write_json(cell, {"schema": 99})
    with pytest.raises(ValueError, match=rf"{cell}: schema must be 1, got 99"):
        check_schema(tmp_path / "c")


def test_two_processes_do_not_work_on_one_block(tmp_path: Path) -> None:
    a = arm(tmp_path, "a")
    scratch = tmp_path / "results" / "c" / ".blocks" / "b"
    scratch.mkdir(parents=True)
    with (scratch / "lock").open("w", encoding="ascii") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second = Thread(target=run, args=(tmp_path, a))
        second.start()
        second.join(0.3)
        assert num_runs(a) == 0
    second.join()
    assert num_runs(a) == 1


def test_nothing_but_the_lock_is_left_of_the_scratch(tmp_path: Path) -> None:
    run(tmp_path, arm(tmp_path, "a"), arm(tmp_path, "b", how="exit"))
    left = sorted(p.name for p in (tmp_path / "results" / "c" / ".blocks" / "b").iterdir())
    assert left == ["lock"]


def test_the_child_does_not_import_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rival = tmp_path / "bench"
    rival.mkdir()
    (rival / "__init__.py").write_text("raise ImportError('rival')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert os.listdir() == ["bench"]  # noqa: PTH208
    assert run(tmp_path, arm(tmp_path, "a"))["a"].state == "done"


def test_a_cell_that_is_moved_aside_is_said_to_be(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, arm(tmp_path, "a"))
    capfd.readouterr()
    run(tmp_path, arm(tmp_path, "a", config_hash="2"))
    aside = tmp_path / "results" / ".stale" / "c" / "a.1"
    told = capfd.readouterr().err.splitlines()
    assert f"a: measured with other settings, moved aside to {aside}" in told


def test_off_a_terminal_a_block_and_each_of_its_arms_say_that_they_start(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, arm(tmp_path, "vanilla"))
    capfd.readouterr()
    run(tmp_path, *(arm(tmp_path, name) for name in ("vanilla", "eagle2", "chain")))
    assert capfd.readouterr().err.splitlines() == [
        "b: loads its target for eagle2, chain",
        "b: eagle2 starts",
        "b: chain starts",
    ]
