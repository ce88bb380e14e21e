"""Whether a machine and a cell's layers suit its schemes and kernels: looked at before weights are.

Every part is looked at, the target's layers as they are stacked, those of heads and smaller models
as well. What does not fit is one line that ends with the nearest choice that does.

Letters: K in-features, N out-features.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import takewhile
from pathlib import Path

import torch

from bench.config import Config
from bench.machine import check_gpu
from bench.schemes import DRAFT_LM_HEAD, DRAFT_SCHEME, LM_HEAD, every_scheme
from methods.architecture import fused_shapes, read_shape, stacked_shapes
from methods.checkpoint import quantization_of
from methods.head_shapes import EMBEDDING
from methods.head_shapes import LM_HEAD as HEAD_OUTPUT
from methods.weights import Weights, read_config
from quant.kernels.choice import asked, missing, named
from quant.kernels.kernel import Kernel
from quant.scheme import AUTO, REFERENCE, QuantLinear, Scheme

# A process of its own: a CUDA context in the parent would take memory from its children.
PROBE = (
    "import sys, torch; from quant.kernels.choice import missing; "
    "print(missing(sys.argv[1], torch.device(sys.argv[2])))"
)
ROWS = 64  # of the slice that shows whether a kernel takes a layer: every kernel's unit of N
GROUPS = (128, 64, 32, 16, -1)  # sizes of a group that are offered, the nearest first

Shape = tuple[int, int]  # [N, K]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Layers of one scheme. key: that chooses the scheme. shapes: by name."""

    key: str
    scheme: Scheme
    shapes: Mapping[str, Shape]


def check_kernels(config: Config) -> None:
    """Check the GPU, and every kernel that is named against it."""
    own, device = config.schemes, config.settings.device
    check_gpu(device)
    if config.settings.exact:
        _check_exact(config)
    for scheme in filter(None, (own.target, own.lm_head, own.draft, own.draft_lm_head)):
        if scheme.kernel not in (AUTO, REFERENCE) and (reason := lacking(scheme.kernel, device)):
            raise ValueError(reason)


def passed_over(config: Config) -> list[str]:
    """Say in one line each what keeps `auto` from kernels that it asks before the one it takes.

    Of layers that will be quantised, the target's and those that draft, by one of the target's
    size.
    """
    own, settings = config.schemes, config.settings
    n, k = stacked_shapes(read_shape(read_config(config.model.family.target)))["qkv"]
    dtype: torch.dtype = getattr(torch, settings.dtype)
    found: list[str] = []
    for scheme, exact in ((own.target, settings.exact), (own.draft, False)):
        if (
            scheme.kernel != AUTO
            or scheme.label == own.dense.label
            or not _holds(scheme, {"": (n, k)})
        ):
            continue
        layer = sample(scheme, n, k)
        fitting = [
            kernel.name
            for kernel in asked(exact=exact)
            if not _unfit(kernel, layer, dtype, exact=exact)
        ]
        found += takewhile(bool, (lacking(name, settings.device) for name in fitting))
    return list(dict.fromkeys(found))


def check_layers(config: Config, folders: Sequence[Path]) -> None:
    """Check every layer against its scheme and a kernel that is named. folders: of the method."""
    dtype: torch.dtype = getattr(torch, config.settings.dtype)
    for part in parts(config, folders):
        for name, (n, k) in part.shapes.items():
            layer = f"{part.key}: {name} of K={k}, N={n}"
            try:
                taken = sample(part.scheme, n, k)
            except ValueError as error:
                raise ValueError(f"{layer}: {error}; {_nearest(part)} works") from error
            if part.scheme.kernel in (AUTO, REFERENCE):
                continue
            kernel = named(part.scheme.kernel)
            exact = config.settings.exact and part.key.startswith("quant")  # of the target alone
            if reason := _unfit(kernel, taken, dtype, exact=exact):
                raise ValueError(f"{layer}: {reason}")


def parts(config: Config, folders: Sequence[Path]) -> Iterator[Part]:
    """Every scheme that will round layers, with the layers. folders: of the method."""
    schemes, family = config.schemes, config.model.family
    yield from _model(family.target, schemes.target, schemes.lm_head, ("quant", f"quant.{LM_HEAD}"))
    drafts = (f"method.{DRAFT_SCHEME}", f"method.{DRAFT_LM_HEAD}")
    own = schemes.draft_lm_head or schemes.dense
    for folder in folders:
        if family.small is not None and folder == family.small.target:
            yield from _model(folder, schemes.draft, own, drafts)
            continue
        shapes = _head(folder)
        output = shapes.pop(HEAD_OUTPUT, None)
        yield Part(key=drafts[0], scheme=schemes.draft, shapes=shapes)
        if output is not None:
            yield Part(key=drafts[1], scheme=own, shapes={HEAD_OUTPUT: output})


@cache
def sample(scheme: Scheme, n: int, k: int) -> QuantLinear:
    """Make a few rows of a layer in a scheme; ValueError where it cannot hold such a layer.

    What schemes and kernels ask of N is a multiple: rows with the same remainder stand for all.
    """
    rows = torch.randn(ROWS + n % ROWS, k, generator=torch.Generator().manual_seed(0))
    absmax = torch.ones(k) if scheme.needs_absmax else None
    return scheme.layer(scheme.unsearched.pack(rows, absmax))


def _unfit(kernel: Kernel, layer: QuantLinear, dtype: torch.dtype, *, exact: bool) -> str:
    """Say in one line why a kernel takes no such layer, whatever the machine."""
    return kernel.unfit(layer, dtype) or (kernel.inexact(layer, dtype) if exact else "")


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


def _model(folder: Path, scheme: Scheme, lm_head: Scheme, keys: tuple[str, str]) -> Iterator[Part]:
    """A whole model's; nothing of one whose layers are taken as they are stored."""
    if quantization_of(folder) is not None:
        return
    shapes = stacked_shapes(read_shape(read_config(folder)))
    output = shapes.pop("lm_head")
    for key, own, layers in ((keys[0], scheme, shapes), (keys[1], lm_head, {"lm_head": output})):
        if not own.as_stored:
            yield Part(key=key, scheme=own, shapes=layers)


def _head(folder: Path) -> dict[str, Shape]:
    """Matrices of a draft head, as they are stacked; its embedding is none."""
    weights = Weights(folder)
    sizes = {name: weights.spec(name).shape for name in weights.keys() - {EMBEDDING}}
    stacked = fused_shapes({name: size for name, size in sizes.items() if len(size) == 2})
    return {name: (size[0], size[1]) for name, size in sorted(stacked.items())}


def _nearest(part: Part) -> str:
    """The same scheme in other groups, where its key can say so; else another one that fits."""
    if part.key == "quant" and any(field.name == "group_size" for field in fields(part.scheme)):
        for size in GROUPS:
            other = replace(part.scheme, group_size=size)  # type: ignore[call-arg]
            if _holds(other, part.shapes):
                return f"{part.key}.group_size={size}"
    fitting = []
    for name, scheme in every_scheme():
        if not scheme.as_stored and _holds(scheme, part.shapes):
            size = sum(sample(scheme, n, k).weight_bytes for n, k in part.shapes.values())
            fitting.append((size, name))
    return f"{part.key}={min(fitting)[1]}"  # dense holds all


def _holds(scheme: Scheme, shapes: Mapping[str, Shape]) -> bool:
    try:
        for n, k in shapes.values():
            sample(scheme, n, k)
    except ValueError:
        return False
    return True
