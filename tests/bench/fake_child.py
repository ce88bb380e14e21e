"""A child without models: does to its arms what their configuration says.

`done`, or a way to die: exit, kill, segv, quiet; or to fail: memory, value, wrong. `before: true`
lets the process die before any arm is announced. Where nothing is said, Ctrl-C comes.
"""

import os
import signal
import time
from pathlib import Path

from bench.child import ArmJob, Child, run_child
from bench.record import Status


def work(child: Child) -> None:
    for arm in child.job.arms:
        with (Path(arm.folder) / "runs").open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
    if any(arm.config.get("before") for arm in child.job.arms):
        os._exit(9)
    for arm in child.job.arms:
        child.announce(arm, "p0 turn 0")
        with child.charged([arm], building=arm.config.get("how") == "value"):
            act(arm)
    for arm in child.job.arms:
        child.end(arm, Status(state="done"))


def act(arm: ArmJob) -> None:
    match arm.config.get("how"):
        case None:
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(60)
        case "exit":
            os._exit(7)
        case "quiet":
            os._exit(0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        case "value":
            raise ValueError("top_k must be small")
        case "wrong":
            raise KeyError("lost")


if __name__ == "__main__":
    run_child(work)
