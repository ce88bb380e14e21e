"""What a cell's weights and caches take at least, from files alone, beside what the device has.

A lower bound: activations, masks and what an allocator rounds up are not in it. So what is refused
here could not have run, and what passes may still run out of memory.

Letters: N out-features, K in-features.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from bench.build import ROOT, build, named_node
from bench.config import Config
from methods.architecture import EMBEDDING, read_shape, transformer_shapes
from methods.checkpoint import quantization_of
from methods.head_shapes import EMBEDDING as HEAD_EMBEDDING
from methods.head_shapes import LM_HEAD
from methods.weights import Weights, read_config
from quant.scheme import Scheme

GIB = 2**30
ROWS = 32  # of the slice that a scheme packs to show its size
MEMINFO = Path("/proc/meminfo")
# A process of its own: a CUDA context in the parent would take memory from its children.
FREE_ON_GPU = "import sys, torch; print(torch.cuda.mem_get_info(int(sys.argv[1]))[0])"


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of weights, and of caches and features for each token of the context."""

    weights: int
    per_token: int
    context: int

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.weights + self.per_token * self.context


def available(device: str) -> int | None:
    """Bytes that are free on a device; None where nobody says."""
    kind, _, index = device.partition(":")
    if kind == "cuda":
        line = [sys.executable, "-c", FREE_ON_GPU, index or "0"]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        return int(done.stdout) if done.returncode == 0 else None
    if not MEMINFO.is_file():
        return None
    lines = MEMINFO.read_text(encoding="ascii").splitlines()
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def needed(config: Config, folders: Sequence[Path], positions: int) -> Need:
    """Add up a target and what its method reads. folders: of the method. positions: the target's.

    ValueError where a scheme cannot hold a layer.
    """
    schemes, family = config.schemes, config.model.family
    dtype: torch.dtype = getattr(torch, config.settings.dtype)
    context = _context(config, positions)
    weights = _model_bytes(family.target, schemes.target, schemes.lm_head, dtype)
    per_token = _cache_bytes(family.target, dtype)
    ids = config.draft_ids if folders else None
    for folder in folders:
        own = schemes.draft_lm_head or schemes.dense
        if family.small is not None and folder == family.small.target:
            weights += _model_bytes(folder, schemes.draft, own, dtype)
            per_token += _cache_bytes(folder, dtype)
        else:
            weights += _head_bytes(
                folder, schemes.draft, own, dtype, most=None if ids is None else len(ids)
            )
    return Need(weights=weights, per_token=per_token, context=context)


def _context(config: Config, positions: int) -> int:
    """Tokens that caches are made for: of all sequences of a batch, at the cost door."""
    if config.cost is None:
        return config.settings.context or positions
    cost = config.cost
    return max(cost.batches) * (max(cost.contexts) + max(cost.widths))


def misfit(config: Config, folders: Sequence[Path], positions: int, *, have: int | None) -> str:
    """Say what does not fit into `have` bytes, and the nearest choice that does; else nothing."""
    need = needed(config, folders, positions)
    if have is None or need.total <= have:
        return ""
    return (
        f"memory: {gib(need.total)} are needed at least, {gib(need.weights)} of weights and "
        f"{gib(need.total - need.weights)} of caches for a context of {need.context}; "
        f"{config.settings.device} has {gib(have)}: {_nearest(config, folders, need, have)}"
    )


def _nearest(config: Config, folders: Sequence[Path], need: Need, have: int) -> str:
    """The same with a shorter context, where an answer fits into it; else a smaller scheme."""
    left = (have - need.weights) // need.per_token
    if config.cost is None and left > config.task.max_new_tokens:
        return f"context={left} fits"
    target = config.model.family.target
    if quantization_of(target) is not None:
        return "nothing here fits"  # as it is stored, and that was too much
    fitting = []
    for path in sorted((ROOT / "conf" / "quant").glob("*.yaml")):
        node = named_node("quant", path.stem, key="quant")
        scheme = build(node, Scheme, key="quant")  # type: ignore[type-abstract]
        other = replace(config, schemes=replace(config.schemes, target=scheme))
        try:
            total = needed(other, folders, need.context).total
        except ValueError:  # the shapes do not suit that scheme, so it is no choice
            continue
        if total <= have:
            fitting.append((total, path.stem))
    if not fitting:
        return "nothing here fits"
    total, name = max(fitting)
    return f"quant={name} fits with {gib(total)}"


def _model_bytes(folder: Path, scheme: Scheme, lm_head: Scheme, dtype: torch.dtype) -> int:
    weights = Weights(folder)
    if quantization_of(folder) is not None:
        return sum(_stored_bytes(weights, name, dtype) for name in weights)
    total = 0
    shapes = transformer_shapes(read_shape(read_config(folder)))
    if EMBEDDING in shapes and "lm_head.weight" not in shapes and lm_head.label != "dense":
        total += packed_bytes(lm_head, *shapes[EMBEDDING], dtype)  # tied, packed beside itself
    for name, size in shapes.items():
        if len(size) == 1 or name == EMBEDDING:
            total += _plain_bytes(size, dtype)
        else:
            own = lm_head if name == "lm_head.weight" else scheme
            total += packed_bytes(own, *size, dtype)
    return total


def _head_bytes(
    folder: Path, scheme: Scheme, lm_head: Scheme, dtype: torch.dtype, *, most: int | None
) -> int:
    """A draft head; its embedding, which is a copy of the target's in most, is left out.

    most: rows of its lm_head; None = all.
    """
    weights = Weights(folder)
    total = 0
    for name in weights.keys() - {HEAD_EMBEDDING}:
        size = weights.spec(name).shape
        if len(size) == 2:
            n, k = size
            own, n = (lm_head, min(n, most or n)) if name == LM_HEAD else (scheme, n)
            total += packed_bytes(own, n, k, dtype)
    return total


def _cache_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Keys and values of one token."""
    shape = read_shape(read_config(folder))
    return _plain_bytes((2, shape.num_layers, shape.num_kv_heads, shape.head_dim), dtype)


@cache
def packed_bytes(scheme: Scheme, n: int, k: int, dtype: torch.dtype) -> int:
    """Bytes of an [N, K] weight in a scheme, by what it makes of a few rows."""
    rows = min(ROWS, n)
    slice_ = torch.randn(rows, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    absmax = torch.ones(k, dtype=dtype) if scheme.needs_absmax else None
    packed = scheme.pack(slice_, absmax)
    per_input = sum(t.nbytes for name, t in packed.items() if name in Scheme.per_input)
    return per_input + (sum(t.nbytes for t in packed.values()) - per_input) * n // rows


def _stored_bytes(weights: Weights, name: str, dtype: torch.dtype) -> int:
    """What is dense is cast to `dtype` when it is read; codes and scales stay."""
    spec = weights.spec(name)
    (own,) = spec.dtypes
    if own.is_floating_point and dtype.itemsize < own.itemsize:
        own = dtype
    return _plain_bytes(spec.shape, own)


def _plain_bytes(size: Sequence[int], dtype: torch.dtype) -> int:
    return torch.Size(size).numel() * dtype.itemsize


def gib(count: int) -> str:
    """Bytes for a reader."""
    return f"{count / GIB:.2f} GiB"
