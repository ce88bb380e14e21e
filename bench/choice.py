"""What a user chose, in words: the labels of a cell and the name of its folder.

Labels come from the chosen files and the explicit overrides, never from values: a changed default
makes the same folder stale, and a sweep over a parameter gives every value a folder.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import hub
from bench.build import named_node
from bench.identity import IRRELEVANT, digest

GROUPS = ("model", "quant", "method", "task")
TARGET = "model.target"
ACCEPT, MEASURED = "accept", "measured"  # a group that is named where it is not this choice
# Where things lie is no choice between things: what lies there is known by its hash. The name of a
# target's folder is one, where it is not the model's own (`Choice.reading`).
PLACES = (
    TARGET,
    "model.heads",
    "model.small",
    "model.calibration",
    "task.path",
    "task.data_dir",
    "quality.reference",
)
# A file that is a choice between files, by its name.
DRAFT_VOCAB = "method.draft_vocab"
SCORE = "score."  # how a task's answers are judged
MAX_NAME = 200  # bytes of a folder's name; file systems take 255


@dataclass(frozen=True, kw_only=True)
class Choice:
    """names: group -> file. overrides: full key -> value, of those that tell cells apart."""

    names: Mapping[str, str]
    overrides: Mapping[str, str]

    @property
    def cell(self) -> str:
        """Name of the cell's folder."""
        return self._named(GROUPS, self.overrides)

    @property
    def block(self) -> str:
        """Name of the block: the cell's less all of its method."""
        groups = [group for group in GROUPS if group != "method"]
        return self._named(groups, self.less("method.").overrides)

    def label(self, group: str) -> str:
        """The choice in a group with what was changed in it, such as `eagle2[depth=3]`."""
        start = f"{group}."
        starts = (start, SCORE) if group == "task" else (start,)
        own = sorted((k, v) for k, v in self.overrides.items() if k.startswith(starts))
        inside = ",".join(f"{k.removeprefix(start)}={v}" for k, v in own if k != TARGET)
        return self.names[group] + (f"[{inside}]" if inside else "")

    @property
    def folder(self) -> str:
        """Name of the target's folder, where it is not the model's own; else empty."""
        return self.overrides.get(TARGET, "")

    def reading(self, target: str) -> "Choice":
        """Tell a target of another name from the model's own. target: a folder or a hub id."""
        own = named_node("model", self.names["model"], key="model")[TARGET.rpartition(".")[2]]
        if _last(target) == _last(own):
            return self
        return replace(self, overrides={**self.overrides, TARGET: _last(target)})

    def less(self, *prefixes: str, **names: str) -> "Choice":
        """Leave out overrides, and choose other files."""
        kept = {k: v for k, v in self.overrides.items() if not k.startswith(prefixes)}
        return Choice(names={**self.names, **names}, overrides=kept)

    def _named(self, groups: Iterable[str], overrides: Mapping[str, str]) -> str:
        chosen = [self.names[group] for group in groups]
        if (accept := self.names.get(ACCEPT, MEASURED)) != MEASURED:
            chosen.append(accept)
        changed = sorted(overrides.items())
        whole = ".".join(chosen + [f"{key}={value}" for key, value in changed])
        name = re.sub(r"[^\w.=+-]+", "_", whole, flags=re.ASCII)
        if name == whole and len(name) <= MAX_NAME:
            return name
        return f"{name[: MAX_NAME - 9]}~{digest(whole)[:8]}"


def choose(names: Mapping[str, str], overrides: Sequence[str]) -> Choice:
    """Read Hydra's own account of a job: its choices, and its overrides such as `+a.b=3`."""
    split = (override.lstrip("+~").partition("=") for override in overrides)
    return Choice(
        names={group: name for group, name in names.items() if group in (*GROUPS, ACCEPT)},
        overrides={
            key: Path(value).name if key == DRAFT_VOCAB else value
            for key, _, value in split
            if key not in (*GROUPS, ACCEPT, *IRRELEVANT, "experiment")
            and not key.startswith(PLACES)
        },
    )


def _last(name: str) -> str:
    """Last part of a folder's path, or of a hub id with its revision."""
    return name.partition("/")[2] if hub.is_id(name) else Path(name).name
