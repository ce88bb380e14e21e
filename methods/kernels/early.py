"""Launches that begin before the kernel ahead of them ends (programmatic dependent launch).

On Hopper and later a launch costs about half a microsecond less so, and what is read beforehand
costs nothing. A kernel that takes EARLY must

- `admit` the next kernel, best at once: that one waits by itself;
- `await_earlier` kernels, in every program, before it writes anything and before it reads what they
  may be writing still. Until then it may read what no kernel of a step writes, such as weights, and
  what was written before the newest plain launch: that began when all ahead of it had ended.

Its launch passes `**early(device)`. After its wait a kernel sees all that came before, since none
ends before its own wait has.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

OLDEST = (9, 0)  # compute capability


@triton.jit
def admit(EARLY: tl.constexpr):
    """Let the next kernel start as soon as all programs of this one have."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def await_earlier(EARLY: tl.constexpr):
    """Wait until all earlier kernels have ended and what they wrote can be read."""
    if EARLY:
        gdc_wait()


@cache
def _can(device: torch.device) -> bool:
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST


def early(device: torch.device) -> dict[str, bool]:
    """Keywords of a launch on a device: `EARLY`, and what the launcher must know of it."""
    return {"EARLY": True, "launch_pdl": True} if _can(device) else {"EARLY": False}
