"""Launches that begin before the kernel ahead of them ends (programmatic dependent launch).

On Hopper and later a launch costs about a quarter of a microsecond less so, and what the wait
allows to be read beforehand costs nothing. A kernel that takes EARLY must

- `admit` the next kernel, best at once: that one waits by itself;
- `await_earlier` kernels in every program, before it reads what one of them writes and before it
  writes anything at all. Until then it may read what no kernel of the step writes: weights, tables.

Its launch passes `**early(device)`. All that wait see all that came before: a kernel ends after its
own wait, and so after every kernel ahead of it.
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
