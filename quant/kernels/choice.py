"""Which kernel computes a layer: the one that was asked for, or the fastest that can.

`auto` on a CPU is the reference. On a GPU it is what `specquant kernels` measured as the fastest on
this machine; of a layer that nobody measured, the first in this order that takes it:

    cuda > humming > triton > torch > reference

That is the order of their times on an H200 for 1 to 64 tokens (LOG.md): our CUDA kernels lead in
w4a16 (Llama-3-70B's four layers summed), humming in every other format that it computes; tinygemm
keeps up at one token and takes 15 times as long at 64. Dense layers alone take up to 3 % longer by
ours than by cuBLAS, a forward of Llama-3-8B 7 % less: weights come before they are needed.

Where layers must be exact (`Kernel.inexact`), humming comes last, since it gives up splitting its
sums for it, and the reference always multiplies as many rows.
"""

from collections.abc import Sequence

import torch

from quant.kernels.cuda_kernel import CudaKernel
from quant.kernels.exact import fixed
from quant.kernels.humming import HummingKernel
from quant.kernels.kernel import Absent, Kernel
from quant.kernels.machine import machine_of
from quant.kernels.table import Table, entry, read_table
from quant.kernels.torch_kernels import TorchKernel
from quant.kernels.triton_kernel import TritonKernel
from quant.scheme import AUTO, REFERENCE, QuantLinear, Scheme

MARLIN = (
    "the packaged build's L2 hint faults on Hopper (illegal memory access), so it is not driven "
    "here; kernel=humming works"
)
# In the order that `auto` asks them.
AVAILABLE: Sequence[Kernel] = (
    CudaKernel(),
    HummingKernel(),
    TritonKernel(),
    TorchKernel(),
    Absent("marlin", MARLIN),
)
# In the order that `auto` asks them for exact layers.
EXACT_ORDER = ("cuda", "triton", "torch", "humming", "marlin")


def fit(
    layer: QuantLinear, scheme: Scheme, dtype: torch.dtype, *, exact: bool = False
) -> QuantLinear:
    """Give a layer, on its device, in the layout of the scheme's kernel. dtype: of activations.

    exact: see `Kernel.inexact`. Raises ValueError where a kernel was named and refuses.
    """
    device = next(layer.buffers()).device
    # What a checkpoint stores dense is no layer of the kernel that was named for its others.
    asked = AUTO if scheme.as_stored else scheme.kernel
    chosen: Kernel | None = None
    if asked == AUTO and device.type == "cuda":
        table = read_table(machine_of(device))
        chosen = choose(layer, scheme.label, dtype, device, table, exact=exact)
    elif asked not in (AUTO, REFERENCE):
        chosen = named(asked)
        if reason := chosen.refuses(layer, dtype, device, exact=exact):
            raise ValueError(reason)
    if chosen is not None:
        fitted = chosen.fit(layer, dtype, exact=exact)
        if device.type == "cuda":
            # A launch may read weights before the one in front has ended (quant.kernels.early).
            torch.cuda.current_stream(device).synchronize()
        return fitted
    return fixed(layer, dtype) if exact else layer


def choose(
    layer: QuantLinear,
    label: str,
    dtype: torch.dtype,
    device: torch.device,
    table: Table,
    kernels: Sequence[Kernel] = AVAILABLE,
    *,
    exact: bool = False,
) -> Kernel | None:
    """Give the fastest kernel that takes a layer; None: the reference. label: of its scheme."""
    measured = table.kernel(entry(label, exact=exact), layer, dtype)
    if measured == REFERENCE:
        return None
    ordered = sorted(asked(kernels, exact=exact), key=lambda kernel: kernel.name != measured)
    return next((k for k in ordered if not k.refuses(layer, dtype, device, exact=exact)), None)


def asked(kernels: Sequence[Kernel] = AVAILABLE, *, exact: bool = False) -> Sequence[Kernel]:
    """Give kernels in the order in which `auto` asks them, where nobody measured."""
    return sorted(kernels, key=lambda k: EXACT_ORDER.index(k.name)) if exact else kernels


def named(name: str) -> Kernel:
    """Give a kernel by its name, one of `quant.scheme.KERNELS` that computes by itself."""
    return next(kernel for kernel in AVAILABLE if kernel.name == name)


def missing(name: str, device: torch.device) -> str:
    """Say in one line why a named kernel cannot run on a device at all; empty: it can."""
    return "" if name in (AUTO, REFERENCE) else named(name).missing(device)
