"""Runs one generated program against its tests, shut in; refuses where it cannot be.

The program has no network, sees no file of the host's but the interpreter's (read-only), writes
only to an empty folder in memory, and has little time, memory, processes and files. All of it is
asked of the kernel (namespaces and limits of Linux) and looked at afterwards; where one part
cannot be had, nothing runs. `bench.jail` is the other side.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import jail
from bench.build import ROOT
from bench.trial import frame

GRACE_S = 5.0  # for building and leaving the sandbox, on a busy machine
_START = f"import sys; sys.path.insert(0, sys.argv[1]); from {jail.__name__} import main; main()"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may have. processes: threads count. files: open at once."""

    timeout_s: float
    memory_mib: int
    processes: int
    files: int
    file_mib: int  # of its own folder, of each file in it, and of each file in memory (memfd)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended. outcome: passed | failed | timeout | killed. sandbox: the namespaces."""

    outcome: str
    detail: str
    sandbox: str


def check() -> None:
    """Raise ValueError where this machine cannot shut a program in."""
    limits = Limits(timeout_s=10, memory_mib=512, processes=1, files=16, file_mib=1)
    program = "def answer():\n    return 1\n"
    found = run(program, "answer", setup="", test="assert answer() == 1", limits=limits)
    if found.outcome != "passed":
        raise ValueError(f"the sandbox must pass a right program, got {found}")


def run(program: str, entry_point: str, *, setup: str, test: str, limits: Limits) -> Outcome:
    """Run tests against a program. They call `entry_point`; setup is what else they call.

    ValueError where the isolation cannot be had; whatever the program does is an outcome.
    """
    with TemporaryDirectory(prefix="specquant-") as root:
        cell = {"root": root, "python": list(jail.interpreter()), "scratch_mib": limits.file_mib}
        own = {"program": program, "entry_point": entry_point, **vars(limits)}
        case = {"setup": setup, "test": test, "entry_point": entry_point}
        told, errors = _converse(
            frame({"cell": cell, "trial": own}) + frame(case), limits.timeout_s + GRACE_S
        )
    if told is None:
        return Outcome(outcome="timeout", detail="the time is up", sandbox="")
    try:
        found = Outcome(**json.loads(told))
    except (ValueError, TypeError) as error:
        last = (errors.strip() or "nothing").splitlines()[-1]
        raise RuntimeError(f"the sandbox gave no verdict, and said: {last}") from error
    if found.outcome == "refused":
        raise ValueError(
            "score.execute needs mount, PID and network namespaces (Linux 5.12, as root or with "
            f"user namespaces), this machine refuses: {found.detail}"
        )
    return found


def _converse(message: bytes, timeout_s: float) -> tuple[bytes | None, str]:
    """Give what the sandbox said, None where it had to be killed, and its standard error."""
    python = str(Path(sys.executable).resolve())  # not a virtual environment's: no packages
    with subprocess.Popen(
        [python, "-I", "-S", "-B", "-c", _START, str(ROOT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8"},
        start_new_session=True,
    ) as child:
        try:
            told, errors = child.communicate(message, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            _end(child)
            return None, ""
        except BaseException:
            _end(child)
            raise
    return told, errors.decode(errors="replace")


def _end(child: "subprocess.Popen[bytes]") -> None:
    """Kill keeper and judge, and with the judge its whole PID namespace."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
