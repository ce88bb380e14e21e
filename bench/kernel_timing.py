"""Times one layer under every kernel that takes it, and holds each against float64.

A graph of several products is replayed, each on another copy of the weight, so that no copy is
still in the L2 cache when its turn comes again.

Letters: M tokens, K in-features, N out-features.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.timer import Timer
from quant.kernels.choice import AVAILABLE
from quant.kernels.exact import fixed
from quant.kernels.kernel import Kernel
from quant.scheme import REFERENCE, QuantLinear, Scheme

STAGE = "replay"
LEAST_COPIES, LEAST_CALLS = 2, 8
COPIED_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer's name and shape."""

    name: str
    k: int
    n: int

    def __post_init__(self) -> None:
        if min(self.k, self.n) < 1:
            raise ValueError(f"k and n must be 1 or more, got {self.k} and {self.n}")


@dataclass(frozen=True, kw_only=True)
class Timings:
    """How a layer is timed."""

    dtype: torch.dtype
    device: torch.device
    widths: Sequence[int]
    repeats: int
    warmup: int
    rotated_bytes: int
    seed: int
    exact: bool


@dataclass(frozen=True, kw_only=True)
class Product:
    """A layer under one kernel. times_us: of every replay, by M. refusal: why there are none.

    uneven: the first M at which a row was another than among the most; 0: none, or nobody asked.
    """

    kernel: str
    refusal: str = ""
    weight_bytes: int = 0
    max_rel_error: float = 0.0
    uneven: int = 0
    times_us: dict[int, list[float]] = field(default_factory=dict)


@torch.inference_mode()
def products(scheme: Scheme, layer: Layer, how: Timings, *, asked: str | None) -> Iterator[Product]:
    """Time a layer under every kernel, or the one that was asked for; else the reference."""
    generator = torch.Generator(how.device).manual_seed(how.seed)
    weight = torch.randn(layer.n, layer.k, generator=generator, device=how.device)
    absmax = torch.ones(layer.k, device=how.device) if scheme.needs_absmax else None
    if scheme.label == "dense":
        weight = weight.to(how.dtype)
    stored = scheme.pack(weight / layer.k**0.5, absmax)
    del weight
    inputs = {
        m: torch.randn(m, layer.k, generator=generator, device=how.device).to(how.dtype)
        for m in how.widths
    }
    own = scheme.layer(stored).to(how.device)
    expected = {m: own(x.double()) for m, x in inputs.items()}
    taken = False
    for kernel in AVAILABLE:
        if asked not in (None, kernel.name):
            continue
        if refusal := kernel.refuses(own, how.dtype, how.device, exact=how.exact):
            yield Product(kernel=kernel.name, refusal=refusal)
        else:
            taken = True
            yield _product(kernel, own, inputs, expected, how)
    # The reference opens the weight anew for every product: where a kernel is, it never leads.
    if asked == REFERENCE or not taken:
        yield _product(None, own, inputs, expected, how)


def copy_tb_per_s(device: torch.device, *, repeats: int) -> float:
    """Measure the device's own copy, read and write together."""
    source = torch.randn(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    timer = Timer(device)
    target.copy_(source)
    timer.start()
    for _ in range(repeats):
        target.copy_(source)
        timer.mark(STAGE)
    times = sorted(timer.stop().stage_s[STAGE])
    del source, target
    torch.cuda.empty_cache()  # large blocks of their own: what comes next may want all there is
    return 2 * COPIED_BYTES / times[len(times) // 2] / 1e12


def _product(
    kernel: Kernel | None,
    own: QuantLinear,
    inputs: dict[int, Tensor],
    expected: dict[int, Tensor],
    how: Timings,
) -> Product:
    first = _laid_out(kernel, own, how)
    count = max(LEAST_COPIES, -(-how.rotated_bytes // first.weight_bytes))
    copies = [first, *(_laid_out(kernel, deepcopy(own), how) for _ in range(count - 1))]
    worst, times = 0.0, {}
    for m, x in inputs.items():
        found = first(x).double()
        error = float((found - expected[m]).norm() / expected[m].norm())
        worst = max(worst, error) if error == error else error
        times[m] = _times_us(copies, x, how)
    return Product(
        kernel=REFERENCE if kernel is None else kernel.name,
        weight_bytes=first.weight_bytes,
        max_rel_error=worst,
        uneven=_uneven(first, inputs) if how.exact else 0,
        times_us=times,
    )


def _uneven(layer: QuantLinear, inputs: dict[int, Tensor]) -> int:
    """Read the first M rows of the most, from either end; give the first M where bits differ."""
    most = inputs[max(inputs)]
    whole = layer(most)
    for m in sorted(inputs):
        alike = torch.equal(layer(most[:m]), whole[:m])
        if not (alike and torch.equal(layer(most[-m:]), whole[-m:])):
            return m
    return 0


def _laid_out(kernel: Kernel | None, own: QuantLinear, how: Timings) -> QuantLinear:
    """Give a layer to a kernel. None: the reference."""
    if kernel is not None:
        return kernel.fit(own, how.dtype, exact=how.exact)
    return fixed(own, how.dtype) if how.exact else own


def _times_us(copies: Sequence[QuantLinear], x: Tensor, how: Timings) -> list[float]:
    for layer in copies[:2]:
        layer(x)
    calls = max(LEAST_CALLS, len(copies))
    timer = Timer(how.device)
    timer.start().stop()  # what runs before a capture must have ended
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            copies[call % len(copies)](x)
    for _ in range(how.warmup):
        graph.replay()
    timer.start()
    for _ in range(how.repeats):
        graph.replay()
        timer.mark(STAGE)
    return [seconds / calls * 1e6 for seconds in timer.stop().stage_s[STAGE]]
