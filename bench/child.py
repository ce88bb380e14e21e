"""The child's side of a block: what it is asked, how it says what it is doing, how it ends.

A child module has a `main` that calls `run_child` with its work. It announces an arm before
anything that may kill the process, wraps what may fail in `charged`, and ends an arm by its status.
"""

import faulthandler
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.record import STATUS, Status, write_json
from methods.values import read_json

if TYPE_CHECKING:
    from bench.timer import Stopwatch

AGAIN = 75  # exit code: an arm has ended badly, start a fresh process for the rest
OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED")
RUNNING = "running.json"  # what the child is doing
CRASH = "crash.txt"  # where threads stood when a signal came


@dataclass(frozen=True, kw_only=True)
class ArmJob:
    """One arm: the cell's folder, absolute, its method's label, its resolved configuration."""

    folder: str
    label: str
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a child is asked for. baseline: folder of the arm to compare with, or empty.

    command_s: seconds that the command took before its first child.
    """

    name: str
    arms: list[ArmJob]
    baseline: str
    argv: list[str]
    progress: bool
    command_s: float = 0.0


class Child:
    """Announces, blames and ends arms."""

    def __init__(self, job: Job, scratch: Path) -> None:
        self.job = job
        self._scratch = scratch
        self._told: set[str] = set()  # arms of which a line was written

    def watch(self) -> "Stopwatch":
        """Start to charge this process's time to stages: the command's, then our imports."""
        from bench.timer import Stopwatch  # and torch, which not every child has work for

        watch = Stopwatch()
        watch.add("command", self.job.command_s)
        watch.mark("imports")
        return watch

    def announce(self, arm: ArmJob | None, doing: str) -> None:
        """Say what comes next. arm: None is what all of them share.

        Where there are no bars, an arm's first is also a line on standard error.
        """
        running = {"arm": arm.folder if arm else "", "doing": doing}
        write_json(self._scratch / RUNNING, running)
        if arm is not None and not self.job.progress and arm.folder not in self._told:
            self._told.add(arm.folder)
            sys.stderr.write(f"{self.job.name}: {arm.label} starts\n")
            sys.stderr.flush()

    def end(self, arm: ArmJob, status: Status) -> None:
        """Record how an arm ended."""
        write_json(Path(arm.folder) / STATUS, status)

    @contextmanager
    def charged(self, arms: Sequence[ArmJob], *, building: bool) -> Iterator[None]:
        """Make a failure the status of these arms, and leave the process.

        building: a ValueError then says that the parts do not fit: `unsupported`.
        """
        try:
            yield
        except Exception as error:  # whatever it is, it is the arm's result
            for arm in arms:
                self.end(arm, _status(error, building=building))
            raise SystemExit(AGAIN) from error


def run_child(work: Callable[[Child], None]) -> None:
    """Read the job that the command line names, work, and exit."""
    path = Path(sys.argv[1])
    threading.Thread(target=_die_with_parent, daemon=True).start()
    values = read_json(path)
    job = Job(**(values | {"arms": [ArmJob(**arm) for arm in values["arms"]]}))
    with (path.parent / CRASH).open("w", encoding="utf-8") as crash:
        faulthandler.enable(crash)
        work(Child(job, path.parent))
        faulthandler.disable()


def _die_with_parent() -> None:
    """Wait for the end of standard input, a pipe whose other end the parent holds open."""
    while os.read(0, 1):
        pass
    os._exit(1)


def _status(error: Exception, *, building: bool) -> Status:
    lines = str(error).splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    trace = "".join(traceback.format_exception(error))
    if _is_out_of_memory(error):
        return Status(state="oom", reason=reason, traceback=trace)
    if building and isinstance(error, ValueError):
        return Status(state="unsupported", reason=str(error))
    return Status(state="failed", reason=reason, traceback=trace)


def _is_out_of_memory(error: Exception) -> bool:
    """By the message: not every allocator of torch and CUDA has an exception of its own."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(m in str(error) for m in OUT_OF_MEMORY)
