"""What a cell takes of its device at least, from files alone, beside what the device has.

A lower bound: masks, graphs and what an allocator rounds up are not in it. So what is refused here
could not have run, and what passes may still run out of memory.

Letters: N out-features, K in-features, D hidden, I inner width of the feed-forward layer.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from bench import gpu
from bench.build import ROOT, named_node
from bench.config import Config, parse_model
from bench.machine import index_of
from bench.schemes import every_scheme
from methods.architecture import EMBEDDING, read_shape, stacked_shapes, transformer_shapes
from methods.checkpoint import quantization_of
from methods.head_shapes import EAGLE3_PREFIX, FC, LM_HEAD
from methods.head_shapes import EMBEDDING as HEAD_EMBEDDING
from methods.prefill import PREFILL_CHUNK
from methods.weights import Weights, read_config
from quant.scheme import REFERENCE, Scheme

GIB = 2**30
ROWS = 32  # of the slice that a scheme packs to show its size
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of weights; of caches and features for each token of the context; of activations.

    workspace: of what one layer computes while a prompt is read.
    """

    weights: int
    per_token: int
    context: int
    workspace: int

    @property
    def caches(self) -> int:
        """Bytes of caches and features."""
        return self.per_token * self.context

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.weights + self.caches + self.workspace

    def context_within(self, have: int) -> int:
        """The largest context for which `have` bytes suffice, if it reads as many at once."""
        return (have - self.weights - self.workspace) // self.per_token


def available(device: str) -> int | None:
    """Bytes that are free on a device; None where nobody says."""
    if torch.device(device).type == "cuda":
        found = gpu.ask(index_of(device))
        return None if found is None else found.free_bytes
    if not MEMINFO.is_file():
        return None
    lines = MEMINFO.read_text(encoding="ascii").splitlines()
    said = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(said[0]) * 1024 if said else None


def needed(config: Config, folders: Sequence[Path], positions: int) -> Need:
    """Add up a target and what its method reads. folders: of the method. positions: the target's.

    ValueError where a scheme cannot hold a layer.
    """
    schemes, family = config.schemes, config.model.family
    dtype: torch.dtype = getattr(torch, config.settings.dtype)
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
            per_token += _head_token_bytes(folder, dtype)
    return Need(
        weights=weights,
        per_token=per_token,
        context=_context(config, positions),
        workspace=_workspace_bytes(config, positions, dtype),
    )


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
    choices = (
        _contexts(config, need, have),
        _other_schemes(config, folders, need, have),
        _other_models(config, need, have),
    )
    return (
        f"memory: {gib(need.total)} are needed at least, {gib(need.weights)} of weights, "
        f"{gib(need.caches)} of caches for a context of {need.context} and {gib(need.workspace)} "
        f"of activations; {config.settings.device} has {gib(have)}: "
        f"{next(filter(None, choices), 'nothing here fits')}"
    )


def _contexts(config: Config, need: Need, have: int) -> str:
    """The same with a shorter context, where an answer fits into it."""
    left = need.context_within(have)
    if config.cost is None:
        return f"context={left} fits" if left > config.task.max_new_tokens else ""
    cost = config.cost
    longest = left // max(cost.batches) - max(cost.widths)
    least = cost.repeats * cost.catch_up
    return f"cost.contexts=[{longest}] fits" if longest > least else ""


def _other_schemes(config: Config, folders: Sequence[Path], need: Need, have: int) -> str:
    """The same with what drafts, or else the target, in a smaller scheme."""
    for key in ("method.draft_scheme", "quant"):
        part = "draft" if key != "quant" else "target"
        if part == "draft" and not folders:
            continue
        if part == "target" and quantization_of(config.model.family.target) is not None:
            continue  # as it is stored
        fitting: list[tuple[int, str]] = []
        for name, scheme in every_scheme():
            other = replace(config, schemes=replace(config.schemes, **{part: scheme}))
            fitting += _within(other, folders, need.context, have, f"{key}={name}")
        if fitting:
            return _largest(fitting)
    return ""


def _other_models(config: Config, need: Need, have: int) -> str:
    """The same method over a smaller model that is here."""
    fitting: list[tuple[int, str]] = []
    for path in sorted((ROOT / "conf" / "model").glob("*.yaml")):
        model = parse_model(named_node("model", path.stem, key="model"))
        other = replace(config, model=model)
        if model.weights == config.model.weights and model.family.target.is_dir():
            try:
                folders = config.recipe.folders(model.family)
            except ValueError:  # a family that lacks what the method reads is no choice
                continue
            fitting += _within(other, folders, need.context, have, f"model={path.stem}")
    return _largest(fitting) if fitting else ""


def _within(
    config: Config, folders: Sequence[Path], context: int, have: int, name: str
) -> Iterator[tuple[int, str]]:
    """Give another choice's bytes and name, where it fits."""
    try:
        total = needed(config, folders, context).total
    except ValueError:  # the shapes do not suit that scheme, so it is no choice
        return
    if total <= have:
        yield total, name


def _largest(fitting: Iterable[tuple[int, str]]) -> str:
    total, name = max(fitting)
    return f"{name} fits with {gib(total)}"


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


def _head_token_bytes(folder: Path, dtype: torch.dtype) -> int:
    """A draft head's keys and values of one token, and the features that it wants to know of it."""
    weights = Weights(folder)
    matrices = {name: weights.spec(name).shape for name in weights}
    values = sum(2 * size[0] for name, size in matrices.items() if name.endswith("k_proj.weight"))
    features = 0
    if FC in matrices:  # elsewhere by another name: then they are left out
        hidden, k = matrices[FC]
        features = k if any(name.startswith(EAGLE3_PREFIX) for name in weights) else k - hidden
    return _plain_bytes((values + features,), dtype)


def _workspace_bytes(config: Config, positions: int, dtype: torch.dtype) -> int:
    """What stands at once behind a feed-forward layer's gate, and a weight that is opened."""
    folder, scheme = config.model.family.target, config.schemes.target
    shape = read_shape(read_config(folder))
    if config.cost is None:
        n = min(config.settings.context or positions, PREFILL_CHUNK)
    else:
        n = max(config.cost.batches) * max(config.cost.contexts)
    activations = _plain_bytes((n, 3 * shape.intermediate_size + 4 * shape.hidden_size), dtype)
    by_torch = scheme.kernel == REFERENCE or config.settings.device == "cpu"
    opens = by_torch and not scheme.activation_format and not scheme.as_stored
    if scheme.label == config.schemes.dense.label or not opens:
        return activations
    layers = stacked_shapes(shape)
    return activations + max(_plain_bytes(layers[name], dtype) for name in ("gate_up", "down"))


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
    packed = scheme.unsearched.pack(slice_, absmax)
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
