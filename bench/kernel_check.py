"""Whether the kernels that a cell names can run, looked at before weights are read."""

import subprocess
import sys
from functools import cache

import torch

from bench.config import Config
from methods.architecture import read_shape
from methods.transformer import Shape
from methods.weights import read_config
from quant.kernels.choice import missing, named
from quant.scheme import AUTO, REFERENCE, Scheme

# A process of its own: a CUDA context in the parent would take memory from its children.
PROBE = (
    "import sys, torch; from quant.kernels.choice import missing; "
    "print(missing(sys.argv[1], torch.device(sys.argv[2])))"
)
ROWS = 64  # of the slice that shows whether a kernel takes a layer: every kernel's unit of N


def check_kernels(config: Config) -> None:
    """Check every named kernel against the machine, and the target's against its layers."""
    own, settings = config.schemes, config.settings
    if settings.exact:
        _check_exact(config)
    for scheme in filter(None, (own.target, own.lm_head, own.draft, own.draft_lm_head)):
        if scheme.kernel not in (AUTO, REFERENCE) and (
            reason := lacking(scheme.kernel, settings.device)
        ):
            raise ValueError(reason)
    if own.target.kernel not in (AUTO, REFERENCE) and not own.target.as_stored:
        shape = read_shape(read_config(config.model.family.target))
        _check_layers(own.target, shape, getattr(torch, settings.dtype), exact=settings.exact)


def _check_exact(config: Config) -> None:
    """Check that attention is exact: layers can be everywhere, attention is on a GPU alone."""
    settings = config.settings
    kind = torch.device(settings.device).type
    if kind != "cuda":
        raise ValueError(f"exact=true needs device=cuda, where attention is exact, got {kind}")
    if settings.dtype == "float64":
        raise ValueError(
            "exact=true needs dtype=float32, float16 or bfloat16, which attention is exact in, got "
            "float64"
        )
    target = config.model.family.target
    if (dim := read_shape(read_config(target)).head_dim) & (dim - 1):
        raise ValueError(f"exact=true needs a head_dim that is a power of 2, got {dim} in {target}")
    if config.cost is not None and config.cost.batches != [1]:
        raise ValueError(
            f"exact=true needs cost.batches=[1], for whose attention is exact, got "
            f"{config.cost.batches}"
        )


@cache
def lacking(kernel: str, device: str) -> str:
    """Say in one line what a device lacks for a kernel; empty: nothing, or nobody knows."""
    if torch.device(device).type != "cuda":
        return missing(kernel, torch.device(device))
    line = [sys.executable, "-c", PROBE, kernel, device]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _check_layers(scheme: Scheme, shape: Shape, dtype: torch.dtype, *, exact: bool) -> None:
    kernel = named(scheme.kernel)
    heads = shape.num_heads * shape.head_dim
    for k, n in (  # as they are stacked
        (shape.hidden_size, heads + 2 * shape.num_kv_heads * shape.head_dim),
        (heads, shape.hidden_size),
        (shape.hidden_size, 2 * shape.intermediate_size),
        (shape.intermediate_size, shape.hidden_size),
    ):
        # What a kernel asks of N is a multiple: a few rows with the same remainder stand for all.
        rows = torch.randn(ROWS + n % ROWS, k, generator=torch.Generator().manual_seed(0))
        absmax = torch.ones(k) if scheme.needs_absmax else None
        layer = scheme.layer(scheme.pack(rows, absmax))
        reason = kernel.unfit(layer, dtype) or (exact and kernel.inexact(layer, dtype))
        if reason:
            raise ValueError(f"a layer of K={k}, N={n}: {reason}")
