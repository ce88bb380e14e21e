import subprocess
from pathlib import Path

import torch

from bench.context import checkout, context, same_machine

CPU = torch.device("cpu")


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    line = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()


def test_machine_and_versions_are_there() -> None:
    found = context(CPU, ["specquant run", "quant=w4a16"], {"8x16": "reference"}, draft_vocab=None)
    assert found["schema"] == 1
    assert found["argv"] == ["specquant run", "quant=w4a16"]
    assert found["device"]["type"] == "cpu"
    assert found["device"]["name"]
    assert found["threads"] == torch.get_num_threads()
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"].keys() >= {"transformers", "tokenizers", "hydra-core", "numpy"}


def test_no_path_of_this_machine_is_in_it() -> None:
    found = context(CPU, [], {}, draft_vocab=None)
    assert str(Path.home()) not in str(found)
    assert str(Path(__file__).parents[2]) not in str(found)


def test_a_folder_without_git_has_no_commit(tmp_path: Path) -> None:
    assert checkout(tmp_path) == {"commit": None, "dirty": None, "diff_sha256": None}


def test_commit_and_diff_state_of_a_checkout(tmp_path: Path) -> None:
    git(tmp_path, "init")
    (tmp_path / "a.py").write_text("1\n", encoding="utf-8")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a")
    clean = checkout(tmp_path)
    assert clean["commit"] == git(tmp_path, "rev-parse", "HEAD")
    assert clean["dirty"] is False
    (tmp_path / "a.py").write_text("2\n", encoding="utf-8")
    edited = checkout(tmp_path)
    assert edited["dirty"] is True
    assert edited["diff_sha256"] != clean["diff_sha256"]


def test_a_folder_inside_another_checkout_has_no_commit(tmp_path: Path) -> None:
    git(tmp_path, "init")
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert checkout(inside)["commit"] is None


def test_another_device_or_version_is_another_machine() -> None:
    here = context(CPU, [], {}, draft_vocab=None)
    later = here | {"started": "2030-01-01T00:00:00+00:00", "argv": ["x"], "commit": "1"}
    assert same_machine(here, later)
    assert not same_machine(here, here | {"device": {"type": "cuda", "name": "NVIDIA H200"}})
    assert not same_machine(here, here | {"kernels": {"8x16": "humming"}})
    assert not same_machine(here, here | {"packages": here["packages"] | {"torch": "1.0"}})
