"""Models and data by hub id, in other processes: the hub's client reads its environment once."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from bench import hub
from bench.build import ROOT
from methods.values import read_json
from tests.bench.tiny import LENGTHS, LIMIT, write_world
from tests.hub import Hub, Repo, serve

pytest.importorskip("datasets")
TOKEN = "hf_made_up"  # opens the gated repository of the stand-in
BOUND_S = 120  # of a process; a refusal takes seconds, most of them imports

Process = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and prompts in folders, with files beside them that nobody should fetch."""
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    for name in ("modeling_x.py", "consolidated.00.pth", "model.gguf", "pytorch_model.bin"):
        (root / "target" / name).write_text("not for us")
    (root / "target" / "original").mkdir()
    (root / "target" / "original" / "config.json").write_text("{}")
    (root / "pickled").mkdir()
    shutil.copy(root / "target-eagle2" / "config.json", root / "pickled")
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"pickle")
    (root / "data").mkdir()
    shutil.copy(root / "prompts.jsonl", root / "data" / "test.jsonl")
    return root


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A run by ids with the stand-in, and the same command offline, after the stand-in ended."""

    home: Path
    first: Process
    again: Process
    asked: list[str]
    commits: dict[str, str]


def client(home: Path, endpoint: str, *arguments: str, **environment: str) -> Process:
    """Python with a hub and a cache of its own."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=home,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )


def fetch(home: Path, endpoint: str, name: str, **environment: str) -> Process:
    """Fetch one model, and say where it is."""
    program = f"from bench import hub; print(hub.place(hub.fetch({name!r}, key='model.target')))"
    return client(home, endpoint, "-c", program, **environment)


@pytest.fixture(scope="module")
def standing(world: Path) -> Iterator[Hub]:
    repos = {
        "lab/target": Repo(kind="models", folder=world / "target"),
        "lab/target-eagle2": Repo(kind="models", folder=world / "target-eagle2"),
        "lab/pickled": Repo(kind="models", folder=world / "pickled"),
        "lab/gated": Repo(kind="models", folder=world / "target", token=TOKEN),
        "lab/data": Repo(kind="datasets", folder=world / "data"),
    }
    with serve(repos) as found:
        yield found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, standing: Hub) -> Ran:
    home = tmp_path_factory.mktemp("home")
    line = (
        "-m",
        "bench.run",
        f"task.max_new_tokens={LIMIT}",
        "acceptance_floor=0",
        "method=eagle2",
        "model.target=lab/target",
        "model.heads.eagle2=lab/target-eagle2@main",
        "model.small.target=lab/absent",  # of no concern to a method that does not read it
        "task.path=null",
        "task.hub=lab/data",
        "task.hub_split=test",
    )
    with serve(standing.repos) as own:
        first = client(home, own.url, *line)
    again = client(home, own.url, *line, HF_HUB_OFFLINE="1")
    commits = {name: repo.commit for name, repo in own.repos.items()}
    return Ran(home=home, first=first, again=again, asked=own.asked, commits=commits)


@pytest.fixture(scope="module")
def refused_port() -> str:
    """An address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def cells(ran: Ran) -> dict[str, Path]:
    """Folders of the cells, by method."""
    found = ran.home.glob("results/default/*/cell.json")
    return {read_json(path)["method"]: path.parent for path in found}


def test_a_run_by_hub_ids_is_done(ran: Ran) -> None:
    assert ran.first.returncode == 0, ran.first.stderr
    assert sorted(cells(ran)) == ["eagle2", "vanilla"]


def test_the_same_run_offline_finds_its_cells_finished(ran: Ran) -> None:
    assert ran.again.returncode == 0, ran.again.stderr
    assert ran.again.stdout.count(": finished, skipped") == 2


def test_a_cell_names_the_commits_of_what_it_read(ran: Ran) -> None:
    target = f"lab/target@{ran.commits['lab/target']}"
    head = f"lab/target-eagle2@{ran.commits['lab/target-eagle2']}"
    read = {
        method: read_json(path / "cell.json")["revisions"] for method, path in cells(ran).items()
    }
    assert read == {"vanilla": [target], "eagle2": sorted([target, head])}


def test_a_cells_configuration_names_models_at_their_commits(ran: Ran) -> None:
    model = OmegaConf.load(cells(ran)["vanilla"] / "config.yaml").model
    assert model.target == f"lab/target@{ran.commits['lab/target']}"
    assert model.heads.eagle2 == f"lab/target-eagle2@{ran.commits['lab/target-eagle2']}"


def test_only_what_is_read_is_fetched(ran: Ran) -> None:
    got = [line.rpartition("/")[2] for line in ran.asked if line.startswith("GET /lab/target/res")]
    assert sorted(got) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_child_fetches_nothing_again(ran: Ran) -> None:
    assert sum("models/lab/target/tree" in line for line in ran.asked) == 1


def test_pickles_are_fetched_where_there_are_no_safetensors(tmp_path: Path, standing: Hub) -> None:
    done = fetch(tmp_path, standing.url, "lab/pickled")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "pytorch_model.bin"]


def test_a_data_set_folder_is_read_offline(tmp_path: Path, world: Path) -> None:
    program = (
        "from bench.source import read_hub; "
        f"print(len(read_hub({str(world / 'data')!r}, config=None, split='test')))"
    )
    done = client(tmp_path, "http://127.0.0.1:9", "-c", program, HF_HUB_OFFLINE="1")
    assert done.stdout.split() == [str(len(LENGTHS))], done.stderr


def test_a_token_opens_a_gated_repository(tmp_path: Path, standing: Hub) -> None:
    done = fetch(tmp_path, standing.url, "lab/gated", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr


def test_an_interrupted_download_is_gone_on_with(tmp_path: Path, standing: Hub) -> None:
    name = "lab/target"
    folder = Path(fetch(tmp_path, standing.url, name).stdout.strip())
    (folder / "tokenizer.json").unlink()
    offline = fetch(tmp_path, standing.url, name, HF_HUB_OFFLINE="1")
    assert "lab/target@main is not whole in the cache" in offline.stderr
    assert fetch(tmp_path, standing.url, name).returncode == 0
    assert (folder / "tokenizer.json").is_file()


REFUSED = {
    "lab/gated": "ROOT/lab/gated is no folder, and lab/gated is gated: accept its terms at URL/lab",
    "lab/none": "ROOT/lab/none is no folder, and lab/none must be a folder or a model on the hub, ",
    "lab/target@v9": "ROOT/lab/target is no folder, and lab/target has no revision v9 on the hub",
    "a/b/c": "model.target must be a checkpoint folder or a hub id, org/name or org/name@revision",
    "a/b--c": "model.target must be a checkpoint folder or a hub id, org/name or org/name@revision",
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory, standing: Hub) -> dict[str, str]:
    """What is said of each name that cannot be had, all in one process."""
    program = (
        "import json; from bench import hub; said = {}\n"
        f"for name in {list(REFUSED)}:\n"
        "    try: hub.fetch(name, key='model.target')\n"
        "    except ValueError as error: said[name] = str(error)\n"
        "print(json.dumps(said))"
    )
    done = client(tmp_path_factory.mktemp("home"), standing.url, "-c", program)
    assert done.returncode == 0, done.stderr
    return {
        name: text.replace(standing.url, "URL").replace(str(ROOT), "ROOT")
        for name, text in json.loads(done.stdout).items()
    }


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_one_line_with_the_way_out(
    refusals: dict[str, str], name: str
) -> None:
    assert refusals[name].startswith(REFUSED[name])
    assert "\n" not in refusals[name]


def test_no_route_to_the_hub_ends_a_run_before_any_cell(tmp_path: Path, refused_port: str) -> None:
    done = client(tmp_path, refused_port, "-m", "bench.run", "model.target=lab/target")
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: {ROOT / 'lab' / 'target'} is no folder, and lab/target@main cannot be had from "
        f"{refused_port} ("
    )
    assert done.stderr.endswith("or give model.target=<folder>\n")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", ["checkpoints/gptq", "out/of/gptq"])
def test_a_folder_below_the_current_one_is_told_of(
    tmp_path: Path, refused_port: str, name: str
) -> None:
    (tmp_path / name).mkdir(parents=True)
    program = f"import os; os.chdir({str(tmp_path)!r}); from bench import hub; "
    done = client(tmp_path, refused_port, "-c", f"{program}hub.fetch({name!r}, key='model.target')")
    told = f"; {tmp_path / name} is one, but a relative path begins at the checkout"
    assert done.stderr.splitlines()[-1].endswith(told)


def test_no_route_to_a_data_set_is_told_at_once(tmp_path: Path, refused_port: str) -> None:
    program = "from bench.source import read_hub; read_hub('lab/data', config=None, split='test')"
    done = client(tmp_path, refused_port, "-c", program)
    assert "Retrying" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"ValueError: the hub data set lab/data cannot be had from {refused_port} ("
    )
    assert last.endswith("or give a local file with task.path=<file>")


def test_a_folder_wins_over_an_id_of_the_same_spelling() -> None:
    assert hub.place("models/lab") == ROOT / "models" / "lab"
    assert hub.fetch("models/lab", key="model.target") == "models/lab"
    assert not hub.is_id("models/lab")


def test_pins_replace_names_wherever_they_stand() -> None:
    node = {"target": "a/b", "heads": {"eagle2": "a/c"}, "small": {"target": "a/b", "heads": {}}}
    assert hub.pinned(node, {"a/b": "a/b@1"}) == {
        "target": "a/b@1",
        "heads": {"eagle2": "a/c"},
        "small": {"target": "a/b@1", "heads": {}, "small": None},
    }
