"""Functions of tensors that a GPU replays as CUDA graphs, one for every shape of their inputs.

A decoder launches hundreds of small kernels a token; launched one by one from Python they take
longer than they run. A graph launches all of them at once. It reads its inputs at fixed addresses
and writes its outputs at fixed ones, so calls copy in, and what a call returns stands only until a
graph that was captured earlier is replayed, or this one again. So within a step graphs are replayed
in the order in which they were captured. Elsewhere than on a GPU, or when told to, a function
simply runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Key = tuple[tuple[tuple[int, ...], torch.dtype], ...]
WARMUP = 2  # runs before a capture: kernels are compiled and libraries make their workspaces


@dataclass
class Graphs:
    """What one process has captured, and how.

    captured: number of graphs. missed: calls that ran without one, though they might have had it.
    reserved_bytes: memory that captures took. capturing: whether an unknown shape is captured.
    """

    captured: int = 0
    missed: int = 0
    reserved_bytes: int = 0
    capturing: bool = False

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """Capture whatever is called within; what it writes is not to be relied on."""
        outer, self.capturing = self.capturing, True
        try:
            yield
        finally:
            self.capturing = outer


GRAPHS = Graphs()
# All graphs of a device share their scratch memory: they never run at once.
_POOLS: dict[torch.device, torch.cuda.MemPool] = {}


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    staged: list[Tensor | None]  # pinned memory for what comes from the host
    outputs: tuple[Tensor, ...]

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for given, fixed, staged in zip(inputs, self.inputs, self.staged, strict=True):
            if given.is_cuda:
                fixed.copy_(given)
            else:
                # The copy reads pinned memory later: whoever calls again must have waited since, as
                # a step does for its tokens.
                assert staged is not None
                staged.copy_(given)
                fixed.copy_(staged, non_blocking=True)
        self.graph.replay()
        return self.outputs


class Captured:
    """A function of tensors, captured for each shape that it is warmed up with.

    The function must launch the same kernels for equal shapes, wait for nothing, and keep what it
    changes at fixed addresses. Inputs may lie on the host.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        *,
        device: torch.device,
        graphed: bool = True,
    ) -> None:
        """graphed: False where the function cannot be captured; it is then called as it is."""
        self._function = function
        self._device = device
        self._graphed = graphed and device.type == "cuda"
        self._graphs: dict[Key, _Graph] = {}

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Replay, or run where no graph of these shapes stands."""
        if not self._graphed:
            return self._function(*(tensor.to(self._device) for tensor in inputs))
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        if key not in self._graphs:
            if not GRAPHS.capturing:
                GRAPHS.missed += 1
                return self._function(*(tensor.to(self._device) for tensor in inputs))
            self._graphs[key] = self._capture(inputs)
        return self._graphs[key].replay(inputs)

    def _capture(self, inputs: tuple[Tensor, ...]) -> _Graph:
        torch.cuda.empty_cache()  # as a capture does, which would hide what it takes
        before = torch.cuda.memory_reserved(self._device)
        fixed = [tensor.to(self._device, copy=True) for tensor in inputs]
        staged = [None if t.is_cuda else torch.empty_like(t).pin_memory() for t in inputs]
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                self._function(*fixed)
        torch.cuda.current_stream(self._device).wait_stream(side)
        if self._device not in _POOLS:
            _POOLS[self._device] = torch.cuda.MemPool()
        graph = torch.cuda.CUDAGraph()
        pool = _POOLS[self._device].id
        with torch.cuda.graph(graph, pool=pool):  # type: ignore[arg-type]
            outputs = self._function(*fixed)
        GRAPHS.captured += 1
        GRAPHS.reserved_bytes += torch.cuda.memory_reserved(self._device) - before
        return _Graph(graph, fixed, staged, outputs)
