"""Which kernel computes a layer: the one that was asked for, or the fastest that can.

`auto` on a CPU is the reference. On a GPU it is what `specquant kernels` measured as the fastest on
this machine; of a layer that nobody measured, the first in this order that takes it:

    humming > triton > torch > reference

That is the order of their times on an H200 for 1 to 64 tokens (Llama-3-70B's four layers, LOG.md):
humming leads in every quantised format that it computes but w4a16 at 16 to 32 tokens, where our own
Triton kernel is ahead by a sixth, behind by a fifth at 48 to 64, and never depends on how many
tokens are read; tinygemm keeps up at one token and takes 15 times as long at 64. Dense layers
are cuBLAS's.
"""

from collections.abc import Sequence

import torch

from quant.kernels.humming import HummingKernel
from quant.kernels.kernel import Absent, Kernel
from quant.kernels.machine import machine_of
from quant.kernels.table import Table, read_table
from quant.kernels.torch_kernels import TorchKernel
from quant.kernels.triton_kernel import TritonKernel
from quant.scheme import AUTO, REFERENCE, QuantLinear, Scheme

MARLIN = (
    "the packaged build's L2 hint faults on Hopper (illegal memory access), so it is not driven "
    "here; kernel=humming works"
)
# In the order that `auto` asks them.
AVAILABLE: Sequence[Kernel] = (
    HummingKernel(exact=False),
    TritonKernel(),
    TorchKernel(),
    Absent("marlin", MARLIN),
)


def fit(layer: QuantLinear, scheme: Scheme, dtype: torch.dtype) -> QuantLinear:
    """Give a layer, on its device, in the layout of the scheme's kernel. dtype: of activations.

    Raises ValueError where a kernel was named and refuses.
    """
    device = next(layer.buffers()).device
    # What a checkpoint stores dense is no layer of the kernel that was named for its others.
    asked = AUTO if scheme.as_stored else scheme.kernel
    if asked == REFERENCE or (asked == AUTO and device.type != "cuda"):
        return layer
    if asked != AUTO:
        kernel = named(asked)
        if reason := kernel.refuses(layer, dtype, device):
            raise ValueError(reason)
        return kernel.fit(layer, dtype)
    table = read_table(machine_of(device))
    chosen = choose(layer, scheme.label, dtype, device, table)
    return layer if chosen is None else chosen.fit(layer, dtype)


def choose(
    layer: QuantLinear,
    label: str,
    dtype: torch.dtype,
    device: torch.device,
    table: Table,
    kernels: Sequence[Kernel] = AVAILABLE,
) -> Kernel | None:
    """Give the fastest kernel that takes a layer; None: the reference. label: of its scheme."""
    measured = table.kernel(label, layer, dtype)
    if measured == REFERENCE:
        return None
    ordered = sorted(kernels, key=lambda kernel: kernel.name != measured)
    return next((k for k in ordered if not k.refuses(layer, dtype, device)), None)


def named(name: str) -> Kernel:
    """Give a kernel by its name, one of `quant.scheme.KERNELS` that computes by itself."""
    return next(kernel for kernel in AVAILABLE if kernel.name == name)


def missing(name: str, device: torch.device) -> str:
    """Say in one line why a named kernel cannot run on a device at all; empty: it can."""
    return "" if name in (AUTO, REFERENCE) else named(name).missing(device)
