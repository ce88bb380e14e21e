"""Cells that share a target, run by child processes: statuses, resume, and what a crash leaves.

A block's arms run in one child, which loads the target once. The child announces the arm it is
about to run; when it dies, the announced arm gets the blame as its recorded status, and a fresh
child goes on with the rest. Any child module can be used that keeps to `bench.child`.

Resume. A cell is finished when its status says done and its hashes are the planned ones; it is
then left as it is. A cell of other hashes is moved aside to results/.stale and starts over. All
other cells go on from their records. The unit inside a block is the round: one prompt through all
unfinished arms. So arms that run together stay paired in time, also after a kill; an arm that
joins later than vanilla is paired with vanilla's records of the earlier time, by prompt.
"""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

from omegaconf import OmegaConf

from bench.build import ROOT
from bench.child import CRASH, RUNNING, ArmJob, Job
from bench.record import CELL, CONFIG, STATUS, Cell, Record, Status, write_json
from bench.rows import arm_label
from methods.values import read_json

STALE = ".stale"  # of results_dir: cells moved aside, never deleted
SCRATCH = ".blocks"  # of a campaign

R = TypeVar("R", bound=Record)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A planned cell. config: resolved. problem: why it cannot run, where it cannot."""

    folder: Path
    cell: Cell
    config: dict[str, Any]
    problem: str = ""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.folder.name


@dataclass(frozen=True, kw_only=True)
class Block:
    """Arms over one target. baseline: the arm that the others are compared with, if any."""

    name: str
    results_dir: Path
    campaign: Path
    arms: tuple[Arm, ...]
    baseline: str | None


def is_finished(arm: Arm) -> bool:
    """Tell whether an arm's records stand and are what it would give."""
    status = read_status(arm.folder)
    if status is None or status.state != "done":
        return False
    cell = _read_cell(arm.folder)
    return cell is not None and not _changed(cell, arm.cell)


def read_status(folder: Path) -> Status | None:
    """How a cell ended; None where it has not."""
    path = folder / STATUS
    return _parsed(Status, path) if path.exists() else None


def check_schema(campaign: Path) -> None:
    """Refuse a campaign that holds a cell of another schema, by the file's name."""
    for path in sorted(campaign.glob(f"*/{CELL}")):
        _parsed(Cell, path)


def run_block(
    block: Block, *, module: str, argv: Sequence[str], progress: bool, command_s: float = 0.0
) -> dict[str, Status]:
    """Bring every arm of a block to an end; give how each ended.

    module: the child's. argv: of the command, for the records. progress: draw bars. command_s: what
    the command took before its first child, for the records.
    """
    scratch = block.campaign / SCRATCH / block.name
    scratch.mkdir(parents=True, exist_ok=True)
    with _locked(scratch) as lock:
        live = [arm for arm in block.arms if not is_finished(arm)]
        waiting = ", ".join(_label(arm) for arm in live if not arm.problem)
        if waiting and not progress:
            sys.stderr.write(f"{block.name}: loads its target for {waiting}\n")
            sys.stderr.flush()
        for arm in block.arms:
            if arm in live:
                _prepare(arm, block)
            else:
                write_json(arm.folder / CELL, arm.cell)  # labels may have changed
        while live := [arm for arm in live if read_status(arm.folder) is None]:
            job = Job(
                name=block.name,
                arms=[_job_of(arm) for arm in live],
                baseline=_baseline(block),
                argv=list(argv),
                progress=progress,
                command_s=command_s,
            )
            killed = _oom_kills()
            code = _run_child(module, _write_job(scratch, job), lock)
            _settle(scratch, live, code, oom_killed=_oom_kills() > killed)
        for file in (*scratch.glob("*.json"), *scratch.glob(CRASH)):
            file.unlink()
    return {arm.name: _ended(arm) for arm in block.arms}


def _ended(arm: Arm) -> Status:
    status = read_status(arm.folder)
    assert status is not None, "a block brings every arm to an end"
    return status


def _prepare(arm: Arm, block: Block) -> None:
    """Give an arm a folder of its own identity and no status."""
    cell = _read_cell(arm.folder)
    if cell is not None and (changed := _changed(cell, arm.cell)):
        place = _move_aside(arm.folder, block)
        sys.stderr.write(
            f"{arm.name}: measured with other {' and '.join(changed)}, moved aside to {place}\n"
        )
    arm.folder.mkdir(parents=True, exist_ok=True)
    (arm.folder / STATUS).unlink(missing_ok=True)
    OmegaConf.save(OmegaConf.create(arm.config), arm.folder / CONFIG)
    write_json(arm.folder / CELL, arm.cell)
    if arm.problem:
        write_json(arm.folder / STATUS, Status(state="unsupported", reason=arm.problem))


def _move_aside(folder: Path, block: Block) -> Path:
    place = block.results_dir / STALE / block.campaign.relative_to(block.results_dir)
    place.mkdir(parents=True, exist_ok=True)
    number = 1
    while (place / f"{folder.name}.{number}").exists():
        number += 1
    return folder.rename(place / f"{folder.name}.{number}")


def _job_of(arm: Arm) -> ArmJob:
    return ArmJob(folder=str(arm.folder.resolve()), label=_label(arm), config=arm.config)


def _label(arm: Arm) -> str:
    return arm_label(arm.cell.method, arm.cell.draft_scheme)


def _baseline(block: Block) -> str:
    found = (str(arm.folder.resolve()) for arm in block.arms if arm.name == block.baseline)
    return next(found, "")


def _write_job(scratch: Path, job: Job) -> Path:
    for leftover in (RUNNING, CRASH):
        (scratch / leftover).unlink(missing_ok=True)
    write_json(scratch / "block.json", asdict(job))
    return scratch / "block.json"


def _run_child(module: str, job: Path, lock: TextIO) -> int:
    """Run a child to its end. It dies with us: its standard input is a pipe that we hold open.

    It has a session of its own, so that Ctrl-C reaches it through us only; it inherits the lock,
    so that nobody starts a second one while it still breathes.
    """
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    command = [sys.executable, "-P", "-m", module, str(job.resolve())]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        pass_fds=(lock.fileno(),),
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": path},
    ) as child:
        try:
            return child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise


def _settle(scratch: Path, live: Sequence[Arm], code: int, *, oom_killed: bool) -> None:
    """Blame a death that no status explains, so that every child ends at least one arm."""
    left = [arm for arm in live if read_status(arm.folder) is None]
    if len(left) < len(live):
        return
    running = scratch / RUNNING
    folder = read_json(running)["arm"] if running.exists() else ""
    # No arm: it died over what all of them share.
    blamed = [arm for arm in left if str(arm.folder.resolve()) == folder] or left
    crash = scratch / CRASH
    status = Status(
        state="oom" if oom_killed and code == -signal.SIGKILL else "failed",
        reason=_reason(code, running),
        traceback=crash.read_text(encoding="utf-8", errors="replace") if crash.exists() else "",
    )
    for arm in blamed:
        write_json(arm.folder / STATUS, status)


def _reason(code: int, running: Path) -> str:
    where = f" at {read_json(running)['doing']}" if running.exists() else ""
    if code == -signal.SIGKILL:
        return f"the process was killed by SIGKILL{where} (out of host memory?)"
    if code < 0:
        return f"the process was killed by {signal.Signals(-code).name}{where}"
    return f"the process ended with exit code {code}{where}"


def _oom_kills() -> int:
    """Processes that the kernel has killed in our control group for want of memory, so far."""
    with suppress(OSError, ValueError, StopIteration):
        own = Path("/proc/self/cgroup").read_text(encoding="ascii").strip().rpartition("::/")[2]
        events = Path("/sys/fs/cgroup", own, "memory.events").read_text(encoding="ascii")
        return next(int(line.split()[1]) for line in events.splitlines() if "oom_kill " in line)
    return 0


@contextmanager
def _locked(scratch: Path) -> Iterator[TextIO]:
    """Let one process at a time work on a block; the kernel lets go when the last one dies."""
    with (scratch / "lock").open("w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write(f"{scratch.name}: another process works on it, waiting\n")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _read_cell(folder: Path) -> Cell | None:
    path = folder / CELL
    return _parsed(Cell, path) if path.exists() else None


def _changed(one: Cell, other: Cell) -> list[str]:
    """What two identities differ in; labels and the tie threshold are no part of them."""
    parts = {
        "settings": (one.config_hash, other.config_hash),
        "code": (one.code_hash, other.code_hash),
        "weights": (one.weight_hashes, other.weight_hashes),
    }
    return [name for name, (mine, theirs) in parts.items() if mine != theirs]


def _parsed(kind: type[R], path: Path) -> R:
    try:
        return kind.parse(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
