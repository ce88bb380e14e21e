"""Every yaml of conf/ composes and builds; a new file is tested before its author writes a test."""

import itertools
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from bench.build import ROOT
from bench.config import parse, resolve

CONF = ROOT / "conf"
GROUPS = ("model", "quant", "method", "task")


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(door: str, *overrides: str, hydra: bool = False) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(door, overrides=list(overrides), return_hydra_config=hydra)


def parsed(*overrides: str, door: str = "run") -> None:
    parse(resolve(composed(door, *overrides)))


def door_of(task: str) -> str:
    """The door that a task is for: a running text has none of its own but quality's."""
    node = OmegaConf.load(CONF / "task" / f"{task}.yaml")
    return "quality" if node["_target_"] == "bench.text.Text" else "run"


@pytest.mark.parametrize("door", names("."))
def test_a_door_composes(door: str) -> None:
    assert composed(door, hydra=True).hydra.job.chdir is False


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in GROUPS for n in names(g)])
def test_a_choice_builds(group: str, name: str) -> None:
    parsed(f"{group}={name}", door=door_of(name) if group == "task" else "run")


@pytest.mark.parametrize("name", names("quant"))
def test_a_scheme_builds_for_every_part(name: str) -> None:
    parsed(f"quant.lm_head={name}", f"method.draft_scheme={name}", f"method.draft_lm_head={name}")


@pytest.mark.parametrize("name", names("experiment"))
def test_every_cell_of_an_experiment_builds(name: str) -> None:
    sweep = composed("run", f"experiment={name}", hydra=True).hydra.sweeper.params or {}
    axes = [[f"{key}={value}" for value in str(sweep[key]).split(",")] for key in sweep]
    for cell in itertools.product(*axes):
        parsed(f"experiment={name}", *cell)


@pytest.mark.parametrize("path", sorted(CONF.glob("[!d]*/*.yaml")), ids=lambda path: path.stem)
def test_a_choice_says_how_it_is_run(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    comment = [line for line in text.splitlines() if line.startswith("#")]
    assert any("specquant " in line for line in comment), "its first comment has a command"
    assert OmegaConf.load(path)
