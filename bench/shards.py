"""A checkpoint folder that is written part by part, and goes on where it was stopped.

Each part is a shard under its final name from the start; index and config.json come last, so that a
folder is loadable when it is whole and not before.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.identity import CHECKPOINT_FILES
from bench.record import write_json
from methods.values import read_json
from methods.weights import INDEX

UNFINISHED = ".quantizing.json"  # the plan that the shards so far belong to
FINISHED = ".quantized.json"  # the plan of a folder that is whole
NOTES = "specquant"  # key of a shard's metadata


class Shards:
    """The shards of one folder. plan: what makes them; shards of another plan are not mixed in."""

    def __init__(self, out: Path, *, plan: Mapping[str, Any], count: int) -> None:
        """Take up what is there, or raise ValueError where something else is."""
        self.out = out
        self.count = count
        if out.exists() and not out.is_dir():
            raise ValueError(f"out must be a folder, got a file: {out}")
        found = plan_of(out)
        if found is not None and found != plan:
            raise ValueError(f"{out} holds shards of other settings: give another out")
        if found is None and out.exists() and any(out.iterdir()):
            raise ValueError(f"out must be a new, empty or unfinished folder, got {out}")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / UNFINISHED, dict(plan))
        (out / FINISHED).unlink(missing_ok=True)

    def path(self, number: int) -> Path:
        """File of a shard."""
        return self.out / f"model-{number + 1:05d}-of-{self.count:05d}.safetensors"

    def has(self, number: int) -> bool:
        """Whether a shard is written, whole; one that a power cut tore is not."""
        try:
            with safe_open(self.path(number), framework="pt") as file:
                return NOTES in (file.metadata() or {})
        except (SafetensorError, OSError):
            return False

    def write(
        self, number: int, tensors: Mapping[str, Tensor], notes: list[dict[str, Any]]
    ) -> None:
        """Write a shard. notes: what is to be known of its layers, as JSON."""
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_tensors(self.path(number), whole, {"format": "pt", NOTES: json.dumps(notes)})

    def read(self, number: int) -> dict[str, Tensor]:
        """Read a shard back."""
        tensors: dict[str, Tensor] = load_file(self.path(number))
        return tensors

    def notes(self) -> list[dict[str, Any]]:
        """What was noted with all shards, in their order."""
        found: list[dict[str, Any]] = []
        for number in range(self.count):
            with safe_open(self.path(number), framework="pt") as file:
                found += json.loads(file.metadata()[NOTES])
        return found

    def finish(self, *, config: Mapping[str, Any], source: Path) -> None:
        """Write index and config.json, and copy the tokenizer of the folder quantised.

        `close` then ends the work: until it does, the same command goes on.
        """
        weight_map = {}
        size = 0
        for number in range(self.count):
            for name, tensor in self.read(number).items():
                weight_map[name] = self.path(number).name
                size += tensor.nbytes
        copied = [p for pattern in CHECKPOINT_FILES for p in source.glob(pattern)]
        copied += source.glob("generation_config.json")
        for path in copied:
            if path.is_file() and ".safetensors" not in path.name and ".bin" not in path.suffixes:
                shutil.copyfile(path, self.out / path.name)
        write_json(self.out / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        write_json(self.out / "config.json", dict(config))


def plan_of(out: Path) -> dict[str, Any] | None:
    """The plan that a folder was begun or finished with; None where it has none."""
    state = next((out / name for name in (UNFINISHED, FINISHED) if (out / name).is_file()), None)
    return None if state is None else read_json(state)


def is_finished(out: Path, plan: Mapping[str, Any]) -> bool:
    """Whether a folder was finished with this plan."""
    return plan_of(out) == plan and not (out / UNFINISHED).exists()


def close(out: Path) -> None:
    """Say that nothing is left to do in a folder."""
    if (out / UNFINISHED).exists():
        (out / UNFINISHED).replace(out / FINISHED)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    scratch = path.with_suffix(".part")
    save_file(dict(tensors), scratch, metadata=metadata)
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    scratch.replace(path)
