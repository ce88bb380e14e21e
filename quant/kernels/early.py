"""Launches that begin before the kernel ahead of them has ended (programmatic dependent launch).

A launch then costs the microsecond it takes while the kernel ahead still runs. On Hopper and later
a Triton kernel takes it so by EARLY, in this form:

- `admit(EARLY)` is its first statement. The kernel behind may start when all programs of this one
  have come that far; it waits by itself, so nothing is gained by letting it in later.
- `await_earlier(EARLY)` is a statement of its body, in no branch, before any return: every program
  waits, those too that find nothing to do.
- Before that it reads true constants alone (weights, scales, biases, tables of angles), which no
  kernel of a step writes, and it writes nothing. All else (activations, caches, positions, tokens)
  may be what a kernel ahead writes still, and its outputs what one ahead reads still. Of a cache
  what is decided, and how much that is, counts as constant: a read of it begins with a plain
  launch or with a graph, behind all that wrote what the host had decided by then.
- Its launch passes `**early(device)`.

The wait ends when the one kernel directly ahead has ended and what it wrote can be read. That is
enough: that kernel ended after its own wait had, so the one ahead of it had ended too, and so on
back. A kernel without a wait could end, and let the one behind it go on, while those ahead of it
still run. A plain launch (torch, cuBLAS, a copy) starts when all ahead of it have ended, and none
behind it starts before it ends, so it may stand anywhere in between. One thing is left open: a
constant that the launch right ahead of its reader makes; a model's are made long before.
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


def early(device: torch.device) -> dict[str, bool]:
    """Keywords of a launch on a device: `EARLY`, and what the launcher must know of it.

    Older devices, the CPU (Triton's interpreter) and ROCm get plain launches.
    """
    return {"EARLY": True, "launch_pdl": True} if _can(device) else {"EARLY": False}


@cache
def _can(device: torch.device) -> bool:
    # ROCm's devices are called cuda too, and some have a capability of 9.
    if device.type != "cuda" or torch.version.hip or triton.knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST
