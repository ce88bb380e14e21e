"""What the doors that compute have in common: Hydra in front, blocks behind.

Hydra composes the cells; all of them are checked before the first one computes. Cells that share
a target then run together (`bench.block`).
"""

import difflib
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import Protocol, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from bench.age import process_age_s
from bench.block import Block, is_finished, run_block
from bench.build import ROOT
from bench.record import Status
from bench.rows import arm_label

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
OK, UNFINISHED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
HEAD = re.compile(r"model\.(small\.)*heads\.[^.]+")  # of conf/model: any method may be a key there


class Cells(Protocol):
    """Collects the cells of one command."""

    def add(
        self, config: DictConfig, *, names: Mapping[str, str], overrides: Sequence[str]
    ) -> None:
        """Check a cell; ValueError where something is wrong with it."""


class Plan(Cells, Protocol):
    """Groups them for the children that run them."""

    notes: list[str]  # what the user should know and need not act on

    def blocks(self) -> list[Block]:
        """Group the cells; ValueError where none can run."""


C = TypeVar("C", bound=Cells)
Show = Callable[[Sequence[Block]], str]


def open_door(
    name: str, make_plan: Callable[[], Plan], *, module: str, show: Show | None = None
) -> int:
    """Run what the command line asks for; give the exit code.

    name: of the yaml in conf/. module: the child that runs a block. show: what to print at the end
    of the blocks that ran.
    """
    return collect(name, make_plan, finish=partial(execute, module=module, show=show))


def collect(name: str, make: Callable[[], C], *, finish: Callable[[C], int]) -> int:
    """Compose the cells that the command line asks for and hand them on; give the exit code."""
    # Hydra would print its errors on several lines and exit; this makes it raise them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra finds the flag only where nothing but overrides follows or precedes it.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))
    plan = make()
    problems: dict[str, list[str]] = defaultdict(list)

    @hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=name)
    def door(config: DictConfig) -> None:
        job = HydraConfig.get()
        if job.mode == RunMode.MULTIRUN and job.launcher._target_ != BASIC_LAUNCHER:
            _run_at_once(make(), config, finish)
            return
        try:
            plan.add(config, names=job.runtime.choices, overrides=job.overrides.task)
        except ValueError as error:
            problems[str(error)].append(job.job.override_dirname)

    try:
        door()
        if problems:
            return _refuse(problems)
        return finish(plan)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return _refuse({_one_line(error): []})
    except BrokenPipeError:
        raise  # whoever read the output has gone: `bench.pipe`
    except OSError as error:
        return _refuse({unusable(error): []})
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on from here\n")
        return INTERRUPTED


@contextmanager
def sweeping_elsewhere() -> Iterator[None]:
    """Let Hydra, which writes every sweep down, do so in a folder that is gone afterwards."""
    with TemporaryDirectory() as scratch:
        words = enumerate(sys.argv)
        place = next((i for i, word in words if i and word[0] != "-"), len(sys.argv))
        sys.argv.insert(place, f"hydra.sweep.dir='{scratch}'")
        yield


def execute(plan: Plan, *, module: str, show: Show | None = None) -> int:
    """Run planned blocks one after the other; say how every cell ended; give the exit code."""
    blocks = plan.blocks()
    planned_s = process_age_s()
    for note in plan.notes:
        sys.stderr.write(f"note: {note}\n")
    ended: dict[str, str] = {}
    progress = sys.stderr.isatty() and bool(blocks)
    cells = sum(len(block.arms) for block in blocks)
    with tqdm(desc="cells", total=cells, position=0, disable=not progress) as bar:
        for block in blocks:
            ended |= _run(block, module, progress=progress, planned_s=planned_s)
            bar.update(len(block.arms))
    for name, state in ended.items():
        sys.stdout.write(f"{name}: {state}\n")
    if show is not None:
        sys.stdout.write(show(blocks))
    for campaign in dict.fromkeys(str(block.campaign) for block in blocks):
        sys.stdout.write(f"results: {campaign}\n")
    whole = all(state.startswith(("done", "finished")) for state in ended.values())
    return OK if whole else UNFINISHED


def unusable(error: OSError) -> str:
    """Say in one line which file or folder could not be used, and why."""
    if error.filename is None:
        return " ".join(str(error).split())
    return f"{error.filename} must be readable and writable where it is used: {error.strerror}"


def _run(block: Block, module: str, *, progress: bool, planned_s: float) -> dict[str, str]:
    skipped = [arm.name for arm in block.arms if is_finished(arm)]
    if len(skipped) == len(block.arms):
        return dict.fromkeys(skipped, "finished, skipped")
    statuses = run_block(
        block, module=module, argv=sys.argv, progress=progress, command_s=planned_s
    )
    if not progress:
        states = (
            f"{arm_label(arm.cell.method, arm.cell.draft_scheme)} {statuses[arm.name].state}"
            for arm in block.arms
        )
        sys.stderr.write(f"{block.name}: {'; '.join(states)}\n")
    return {
        name: "finished, skipped" if name in skipped else _told(status)
        for name, status in statuses.items()
    }


def _run_at_once(plan: C, config: DictConfig, finish: Callable[[C], int]) -> None:
    """Run one cell in a job of another launcher, where nobody collects them."""
    job = HydraConfig.get()
    plan.add(config, names=job.runtime.choices, overrides=job.overrides.task)
    if finish(plan) != OK:
        raise RuntimeError(f"a cell of {job.job.override_dirname} is not done")


def _told(status: Status) -> str:
    return f"{status.state}: {status.reason}" if status.reason else status.state


def _refuse(problems: Mapping[str, Sequence[str]]) -> int:
    for problem, cells in problems.items():
        where = f" (in {'; '.join(cells)})" if len(cells) > 1 else ""
        sys.stderr.write(f"error: {problem}{where}\n")
    return USER_ERROR


def _one_line(error: Exception) -> str:
    """Join what Hydra and OmegaConf say over several lines, less where they looked."""
    if isinstance(cause := error.__cause__, OmegaConfBaseException):
        if cause.parent_node or HEAD.fullmatch(str(cause.full_key)):
            return _no_key(cause)
        if str(cause.full_key).startswith("model.small."):
            told = "'model.small={target: <folder>, heads: {}}' gives one"
            return f"{cause.full_key}: the model has no smaller one, {told}"
    told = f"{error}\n{error.__cause__ or ''}".partition("Config search path")[0]
    if isinstance(error, OverrideParseException) and repr(error.override) not in told:
        told = f"Error parsing override {error.override!r}\n{told}"
    told = re.sub(r"^In '\w+': ", "", told)  # the file whose defaults list has the group
    lines = dict.fromkeys(line.strip(" .") for line in told.splitlines() if line.strip())
    shown = "; ".join(line for line in lines if not line.strip().startswith("object_type"))
    return shown.replace(":; \t", ": ").replace("; \t", ", ").replace("\t", " ")


def _no_key(error: OmegaConfBaseException) -> str:
    """Name the nearest keys: Hydra would advise to add one, which nothing reads."""
    full, key = str(error.full_key), str(error.key)
    known = [str(name) for name in error.parent_node or () if name != "hydra"]
    near = difflib.get_close_matches(key, known, n=1)
    place = full.removesuffix(key)
    if HEAD.fullmatch(full):
        return f"{full}: no such head, there are {', '.join(known) or 'none'}; +{full}= adds it"
    hint = f"did you mean {place}{near[0]}? " if near else ""
    return f"{full}: no such key, {hint}there are {', '.join(place + name for name in known)}"
