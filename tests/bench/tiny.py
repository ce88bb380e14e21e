"""A tiny random family with a tokenizer, and prompts, as a run takes them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from tokenizers import Tokenizer
from tokenizers.models import BPE

from bench.build import ROOT
from bench.plan import Planner
from bench.record import Generation, read_lines
from tests.family import VOCAB, write_family

LENGTHS = (3, 6, 5, 9)  # of the prompts, in tokens
LIMIT = 10


def write_world(root: Path, lengths: Sequence[int] = LENGTHS) -> list[str]:
    """Write models and prompts; give the overrides that point a run at them."""
    write_family(root)
    for name in ("target", "small"):
        write_tokenizer(root / name)
    rows = [{"prompt_id": f"p{i}", "text": ("abcdef" * n)[:n]} for i, n in enumerate(lengths)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "prompts.jsonl").write_text(text, encoding="utf-8")
    return [
        f"model.target={root / 'target'}",
        *(f"model.heads.{name}={root / f'target-{name}'}" for name in ("eagle2", "eagle3")),
        f"model.small.target={root / 'small'}",
        *(f"model.small.heads.{name}={root / f'small-{name}'}" for name in ("eagle2", "eagle3")),
        f"task.path={root / 'prompts.jsonl'}",
        f"results_dir={root / 'results'}",
        "campaign=c",
        "acceptance_floor=0",  # random heads are right by chance only
    ]


def write_tokenizer(folder: Path, *, first: str = "!", ids_from: int = 0) -> None:
    """Write a tokenizer of one token per character, VOCAB characters from `first` on."""
    vocab = {chr(ord(first) + i): ids_from + i for i in range(VOCAB)}
    Tokenizer(BPE(vocab=vocab, merges=[])).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def composed(*overrides: str, door: str = "run") -> DictConfig:
    """A configuration as Hydra hands it to a door."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(door, overrides=list(overrides))


def planned(world: Sequence[str], *overrides: str, planner: Planner | None = None) -> Planner:
    """Add one cell to a planner, as the door does. world: overrides that go without saying."""
    planner = planner or Planner("bench.cell")
    names = {"model": "lab", "quant": "dense", "method": "vanilla", "task": "lab"}
    split = [override.partition("=") for override in overrides]
    names |= {key: value for key, _, value in split if key in names}
    config = composed(f"task.max_new_tokens={LIMIT}", "threads=1", *world, *overrides)
    planner.add(config, names=names, overrides=list(overrides))
    return planner


def start(*overrides: str) -> "subprocess.Popen[bytes]":
    """Start `specquant run` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "bench.run", *overrides],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def generations(cell: Path) -> list[Generation]:
    """What a cell recorded."""
    return [Generation.parse(values) for values in read_lines(cell / "records.jsonl")]
