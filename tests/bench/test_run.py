import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bench import cell, run
from bench.block import read_status
from bench.cell import seed_of
from bench.child import ArmJob, Child, Job
from bench.plan import Planner
from bench.record import write_json, write_lines
from bench.rounds import interleaved, torn_round
from methods.values import read_json
from tests.bench.tiny import LENGTHS, LIMIT, generations, planned, start, write_world

SMALL = (f"task.max_new_tokens={LIMIT}", "threads=1")
END = f"lab.task.max_new_tokens={LIMIT}.threads=1"
SWEEP = ("-m", "quant=dense,w8a8", "method=chain,eagle2,eagle3", *SMALL)

Door = Callable[..., tuple[int, str, str]]


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Door:
    """`specquant run` in this process: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["specquant run", *arguments])
        code = run.main()
        told = capfd.readouterr()
        return code, told.out, told.err

    return call


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], int]:
    """A sweep that has run, of a model without an EAGLE-3 head: its overrides and exit code."""
    world = [o for o in write_world(tmp_path_factory.mktemp("world")) if "heads.eagle3" not in o]
    line = [*world, "~model.heads.eagle3", *SWEEP]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["specquant run", *line])
        return line, run.main()


def results(world: Sequence[str]) -> Path:
    """The campaign's folder."""
    (found,) = [o.partition("=")[2] for o in world if o.startswith("results_dir=")]
    return Path(found) / "c"


def work(world: Sequence[str], *methods: str, only: str = "") -> list[Path]:
    """Run one block in this process, without the parent's side; give the cells' folders.

    only: run this method and leave the other cells as they are.
    """
    planner = Planner("bench.cell")
    for method in methods:
        planned(world, f"method={method}", planner=planner)
    (block,) = planner.blocks()
    for arm in block.arms:
        arm.folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        ArmJob(folder=str(arm.folder), label=arm.cell.method, config=arm.config)
        for arm in block.arms
        if only in ("", arm.cell.method)
    ]
    baseline = str(block.arms[0].folder)
    job = Job(name="b", arms=jobs, baseline=baseline, argv=["x"], progress=False)
    cell.work(Child(job, block.campaign))
    return [arm.folder for arm in block.arms]


def answers(folder: Path) -> dict[tuple[str, int], list[int]]:
    """Tokens by prompt and turn; nothing may stand twice."""
    found = generations(folder)
    by_turn = {(g.prompt_id, g.turn): g.token_ids for g in found}
    assert len(by_turn) == len(found)
    return by_turn


def children_of(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii")
    return [int(child) for child in text.split()]


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("nothing happened")


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_running(process: int) -> bool:
    path = Path(f"/proc/{process}/stat")
    return path.exists() and path.read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"


def test_orders_turn_around_and_rotate() -> None:
    orders = ["".join(interleaved("ABC", number)) for number in range(7)]
    assert orders == ["ABC", "CBA", "BCA", "ACB", "CAB", "BAC", "ABC"]


def test_seeds_differ_by_prompt_and_turn_and_are_those_of_every_machine() -> None:
    # the first 7 bytes of sha256("0/p0/0"), by coreutils
    assert seed_of(0, "p0", 0) == 0xDCB8B879497043
    assert len({seed_of(s, p, t) for s in (0, 1) for p in ("a", "b") for t in (0, 1)}) == 8


def test_a_sweep_ends_with_a_status_per_cell(swept: tuple[list[str], int]) -> None:
    line, code = swept
    states = {
        folder.name: read_json(folder / "status.json")["state"]
        for folder in results(line).iterdir()
        if (folder / "cell.json").exists()
    }
    assert states == {
        f"lab.{quant}.{method}.{END}": "unsupported" if method == "eagle3" else "done"
        for quant in ("dense", "w8a8")
        for method in ("vanilla", "chain", "eagle2", "eagle3")
    }
    assert code == 1


def test_methods_give_vanillas_tokens(swept: tuple[list[str], int]) -> None:
    folder = results(swept[0])
    vanilla = answers(folder / f"lab.dense.vanilla.{END}")
    assert vanilla.keys() == {(f"p{i}", 0) for i in range(len(LENGTHS))}
    for method in ("chain", "eagle2"):
        assert answers(folder / f"lab.dense.{method}.{END}") == vanilla


def test_only_a_single_uneven_round_is_torn() -> None:
    assert torn_round([{"a", "b"}, {"a"}]) == {"b"}
    assert torn_round([{"a", "b", "c"}, {"a"}]) == set()  # joined late, or failed before
    assert torn_round([{"a"}, {"a"}]) == set()


def test_a_record_holds_what_happened(swept: tuple[list[str], int]) -> None:
    found = generations(results(swept[0]) / f"lab.dense.eagle2.{END}")
    assert [g.prompt_tokens for g in found] == list(LENGTHS)
    assert [g.arm_order for g in found] == [2, 0, 1, 1]  # of vanilla, chain and itself
    beside = generations(results(swept[0]) / f"lab.dense.vanilla.{END}")
    assert len({g.run for g in (*found, *beside)}) == 1  # timed side by side
    for g in found:
        steps = len(g.accepted)
        assert (g.status, g.stop, len(g.token_ids)) == ("ok", "limit", LIMIT)
        assert sum(g.accepted) + steps >= LIMIT
        assert g.drafted == [59] * steps
        assert {stage: len(times) for stage, times in g.stage_s.items()} == {
            "prefill": 1,
            "draft_prefill": 1,
            "host": steps,
            "draft": steps,
            "verify": steps,
            "commit": steps,
            "stop": steps,
        }
        assert sum(sum(times) for times in g.stage_s.values()) <= g.wall_s


def test_every_cell_of_a_process_tells_where_its_start_went(swept: tuple[list[str], int]) -> None:
    told = [
        read_json(results(swept[0]) / f"lab.dense.{method}.{END}" / "context.json")["start_s"]
        for method in ("vanilla", "chain", "eagle2")
    ]
    assert told[0] == told[1] == told[2]
    assert set(told[0]) == {
        *("command", "imports", "tokenizer", "device", "weights", "rounding", "kernels", "layout"),
        *("building", "captures", "warm_up", "first_token"),
    }
    assert min(told[0].values()) >= 0
    assert told[0]["command"] > 0.5  # pytest's own process
    assert told[0]["imports"] > 0.5  # torch


def test_a_second_run_skips_what_is_finished(swept: tuple[list[str], int], door: Door) -> None:
    line = swept[0]
    before = {p: p.stat().st_mtime_ns for p in results(line).rglob("records.jsonl")}
    code, out, err = door(*line)
    assert out.count("finished, skipped") == 6
    assert out.count("unsupported: ") == 2
    assert code == 1
    assert {p: p.stat().st_mtime_ns for p in results(line).rglob("records.jsonl")} == before
    assert "error" not in err


def test_nothing_is_left_besides_the_results(swept: tuple[list[str], int]) -> None:
    folder = results(swept[0])
    assert {p.name for p in folder.parent.iterdir()} == {"c", ".hashes.json"}
    assert {p.name for p in folder.iterdir() if p.name.startswith(".")} == {".blocks", ".sweep"}
    assert not Path("outputs").exists()
    assert not Path("multirun").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["quant=w9"],
            "error: Could not find 'quant/w9'; Available options in ",
        ),
        (["-m", "method=vanilla,nine"], "error: Could not find 'method/nine'; "),
        (
            ["method=eagle2", "method.dept=3"],
            "error: method.dept: no such key, did you mean method.depth? there are method.draft_",
        ),
        (["tepmerature=1"], "error: tepmerature: no such key, did you mean temperature? "),
        (["xyz=1"], "error: xyz: no such key, there are campaign, results_dir, "),
        (["method=eagle2", "method.depth=six"], "error: method.depth: Value 'six' of type"),
        (["method=chain", "+method.inner.x=1"], "error: method.inner.x: no such key, there are "),
        (["method=eagle2", "method.top_k=97"], "error: top_k must be within the head's"),
        (["quant=w4a16,"], "error: Error parsing override 'quant=w4a16,'; mismatched input"),
        (["quant"], "error: Error parsing override 'quant'; missing EQUAL"),
        (["quant.lm_head=w9"], "error: quant.lm_head must be one of checkpoint, dense, "),
        (["model.target=/none"], "error: model.target must be a checkpoint folder or a hub id"),
    ],
)
def test_a_users_error_is_one_line_before_any_compute(
    swept: tuple[list[str], int], tmp_path: Path, door: Door, arguments: list[str], message: str
) -> None:
    world = [o for o in swept[0][: swept[0].index("-m")] if not o.startswith("~")]
    code, out, err = door(*world, f"results_dir={tmp_path}", *arguments)
    assert err.startswith(message)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert not list(tmp_path.rglob("cell.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["model=llama3_8b_instruct", "model.heads.eagle3=x"],
            "model.heads.eagle3: no such head, there are eagle2; +model.heads.eagle3= adds it",
        ),
        (
            ["model=qwen25_7b_instruct", "model.heads.eagle3=x"],
            "model.heads.eagle3: no such head, there are none; +model.heads.eagle3= adds it",
        ),
        (
            ["model=llama3_8b_instruct", "model.small.target=x"],
            "model.small.target: the model has no smaller one, "
            "'model.small={target: <folder>, heads: {}}' gives one",
        ),
    ],
)
def test_who_names_a_part_that_a_model_has_none_of_is_told_how_to_add_it(
    door: Door, arguments: list[str], message: str
) -> None:
    assert door(*arguments) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize("words", [[], ["-m"]])
def test_a_place_that_cannot_be_written_is_one_line(
    swept: tuple[list[str], int], tmp_path: Path, door: Door, words: list[str]
) -> None:
    world = [o for o in swept[0][: swept[0].index("-m")] if not o.startswith("~")]
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "results"
    code, out, err = door(*words, *world, *SMALL, f"results_dir={place}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {place}")
    assert err.endswith(": Not a directory\n")


def test_every_bad_cell_of_a_sweep_is_named(swept: tuple[list[str], int], door: Door) -> None:
    world = [o for o in swept[0][: swept[0].index("-m")] if not o.startswith("~")]
    code, _, err = door(*world, "-m", "method=eagle2", "method.depth=2,0,six")
    assert code == 2
    assert "error: method: depth must be 1 to" in err
    assert "error: method.depth: Value 'six'" in err


def test_a_round_that_some_arm_lacks_is_run_again_by_all(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    vanilla, eagle2 = work(world, "vanilla", "eagle2")
    whole = {folder: generations(folder) for folder in (vanilla, eagle2)}
    # as a kill leaves it: the last round is there for one arm, and half a line for the other
    with (vanilla / "records.jsonl").open("a", encoding="utf-8") as file:
        lines = (eagle2 / "records.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (eagle2 / "records.jsonl").write_text("".join(lines[:3]) + lines[3][:50], encoding="utf-8")
        assert file.tell()
    work(world, "vanilla", "eagle2")
    for folder, before in whole.items():
        after = generations(folder)
        assert after[:3] == before[:3]
        assert [g.wall_s for g in after[3:]] != [g.wall_s for g in before[3:]]
        assert [g.token_ids for g in after] == [g.token_ids for g in before]


def test_an_arm_that_lags_by_several_rounds_costs_the_others_none(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    vanilla, eagle2 = work(world, "vanilla", "eagle2")
    before = {folder: generations(folder) for folder in (vanilla, eagle2)}
    lines = (eagle2 / "records.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (eagle2 / "records.jsonl").write_text(lines[0], encoding="utf-8")  # it failed at the second
    work(world, "vanilla", "eagle2")
    assert generations(vanilla) == before[vanilla]
    assert answers(eagle2) == {(g.prompt_id, g.turn): g.token_ids for g in before[eagle2]}


def test_records_of_another_machine_are_made_again(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    (vanilla,) = work(world, "vanilla")
    before = [g.wall_s for g in generations(vanilla)]
    work(world, "vanilla")
    assert [g.wall_s for g in generations(vanilla)] == before
    assert len(read_json(vanilla / "context.json")["resumed"]) == 1
    path = vanilla / "context.json"
    write_json(path, read_json(path) | {"cpu": "another"})
    work(world, "vanilla")
    assert [g.wall_s for g in generations(vanilla)] != before


def test_a_difference_from_a_finished_vanilla_is_noted(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    (vanilla,) = work(world, "vanilla")
    records = generations(vanilla)
    tokens = records[1].token_ids
    records[1] = replace(records[1], token_ids=[*tokens[:3], (tokens[3] + 1) % 96, *tokens[4:]])
    write_lines(vanilla / "records.jsonl", records)
    _, eagle2 = work(world, "vanilla", "eagle2", only="eagle2")
    noted = [g.divergence for g in generations(eagle2)]
    assert [d is None for d in noted] == [True, False, True, True]
    assert noted[1] is not None
    assert (noted[1]["index"], noted[1]["token"]) == (3, tokens[3])
    assert noted[1]["gap_nats"] > 0


def test_a_prompt_beyond_the_context_is_recorded_as_such(tmp_path: Path) -> None:
    (vanilla,) = work([*write_world(tmp_path), "context=15"], "vanilla")
    found = generations(vanilla)
    assert [g.status for g in found] == ["ok", "too_long", "ok", "too_long"]  # 3, 6, 5, 9 tokens
    assert [len(g.token_ids) for g in found] == [LIMIT, 0, LIMIT, 0]
    assert [g.prompt_tokens for g in found] == list(LENGTHS)


def test_a_second_turn_reads_the_first_answer(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    path = tmp_path / "target" / "tokenizer_config.json"
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    write_json(path, read_json(path) | {"chat_template": template})
    row = {"prompt_id": "p", "text": ["abc", "de"]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    vanilla, eagle2 = work([*world, "task.form=chat"], "vanilla", "eagle2")
    first, second = generations(vanilla)
    assert (first.turn, second.turn) == (0, 1)
    assert second.prompt_tokens == 3 + len(first.token_ids) + 2
    assert answers(eagle2) == answers(vanilla)


def test_a_kill_in_the_middle_loses_nothing_and_doubles_nothing(tmp_path: Path, door: Door) -> None:
    world = write_world(tmp_path, lengths=range(3, 9))
    line = [*world, "method=eagle2", "task.max_new_tokens=24", "threads=1"]
    eagle2 = results(world) / "lab.dense.eagle2.lab.task.max_new_tokens=24.threads=1"
    process = start(*line)
    wait_for(lambda: lines_in(eagle2 / "records.jsonl") > 0)
    (child,) = children_of(process.pid)
    process.kill()
    process.wait()
    wait_for(lambda: not is_running(child))
    killed = generations(eagle2)
    assert 0 < len(killed) < 6
    assert read_status(eagle2) is None

    code, out, _ = door(*line)
    assert code == 0
    assert out.count(": done") == 2
    resumed = answers(eagle2)
    assert generations(eagle2)[0] == killed[0]
    assert len({g.run for g in generations(eagle2)}) == 2

    elsewhere = [f"results_dir={tmp_path / 'whole'}", "task.max_new_tokens=24"]
    _, whole = work([*world, *elsewhere], "vanilla", "eagle2")
    assert resumed == answers(whole)


def test_ctrl_c_ends_the_child(tmp_path: Path, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CHILD", "tests.bench.fake_child")
    world = write_world(tmp_path)
    code, _, err = door(*world)
    assert (code, err.splitlines()[-1]) == (130, "interrupted; the same command goes on from here")
    runs = results(world) / "lab.dense.vanilla.lab" / "runs"
    assert not is_running(int(runs.read_text(encoding="ascii")))


def test_the_command_lists_its_doors() -> None:
    line = [sys.executable, "-m", "bench.cli"]
    told = subprocess.run([*line, "--help"], capture_output=True, text=True, check=True)
    doors = ("check", "run", "cost", "quality", "quantize", "vocab", "kernels", "report")
    assert all(f"specquant {name}" in told.stdout for name in doors)
    refused = subprocess.run([*line, "ran"], capture_output=True, text=True, check=False)
    assert refused.stderr == f"error: a door must be one of {', '.join(doors)}, got 'ran'\n"
    assert refused.returncode == 2


@pytest.mark.parametrize("name", ["run", "quantize", "kernels", "report"])
def test_a_doors_help_says_where_its_keys_are_explained(name: str) -> None:
    line = [sys.executable, "-m", "bench.cli", name, "--help"]
    told = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert told.startswith(f"specquant {name}: conf/ says beside each key what it means\n")


def test_arms_that_differ_in_the_drafters_scheme_alone_are_told_apart(
    tmp_path: Path, door: Door
) -> None:
    world = write_world(tmp_path)
    code, _, err = door(*world, "-m", "method=chain", "method.draft_scheme=dense,w8a8", *SMALL)
    assert code == 0
    assert err.endswith(": vanilla done; chain done; chain, drafter w8a8 done\n")


def test_a_head_that_is_never_right_is_unsupported_not_slow(tmp_path: Path, door: Door) -> None:
    world = write_world(tmp_path)
    code, out, _ = door(*world, "method=eagle2", *SMALL, "acceptance_floor=1000000")
    assert code == 1
    assert f"lab.dense.vanilla.{END}: done" in out
    assert f"lab.dense.eagle2.{END}: unsupported: broken head: acceptance length 1." in out
    assert not (results(world) / f"lab.dense.eagle2.{END}" / "records.jsonl").exists()
