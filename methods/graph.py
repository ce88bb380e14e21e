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
from itertools import accumulate

import torch
from torch import Tensor

Key = tuple[tuple[tuple[int, ...], torch.dtype], ...]
ALIGNMENT = 16  # bytes, of inputs that share memory
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


class _Inputs:
    """Fixed memory for what a graph reads. What comes from the host goes over in one copy."""

    def __init__(self, given: tuple[Tensor, ...], device: torch.device) -> None:
        """given: of the first call, which also says what may come from the host."""
        hosted = [not tensor.is_cuda for tensor in given]
        sizes = [tensor.nbytes * host for tensor, host in zip(given, hosted, strict=True)]
        starts = [0, *accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
        self._room = torch.empty(starts.pop(), dtype=torch.uint8, device=device)
        self._pinned = torch.empty_like(self._room, device="cpu").pin_memory()

        def views(room: Tensor) -> list[Tensor | None]:
            return [
                room[start : start + size].view(tensor.dtype).view(tensor.shape) if host else None
                for tensor, host, start, size in zip(given, hosted, starts, sizes, strict=True)
            ]

        self._staged = views(self._pinned)
        rooms = zip(given, views(self._room), strict=True)
        self.fixed = [torch.empty_like(tensor) if room is None else room for tensor, room in rooms]
        self.fill(given)

    def fill(self, given: tuple[Tensor, ...]) -> None:
        """Copy a call's inputs.

        The copy reads pinned memory later: whoever calls again must have waited since, as a step
        does for its tokens.
        """
        for tensor, staged in zip(given, self._staged, strict=True):
            if not tensor.is_cuda:
                assert staged is not None
                staged.copy_(tensor)
        if len(self._room):
            self._room.copy_(self._pinned, non_blocking=True)
        for tensor, fixed in zip(given, self.fixed, strict=True):
            if tensor.is_cuda:
                fixed.copy_(tensor)


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: _Inputs
    outputs: tuple[Tensor, ...]

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.inputs.fill(inputs)
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
        before = torch.cuda.memory_reserved(self._device)
        held = _Inputs(inputs, self._device)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                self._function(*held.fixed)
        torch.cuda.current_stream(self._device).wait_stream(side)
        if self._device not in _POOLS:
            _POOLS[self._device] = torch.cuda.MemPool()
        graph = torch.cuda.CUDAGraph()
        pool = _POOLS[self._device].id
        with torch.cuda.graph(graph, pool=pool):  # type: ignore[arg-type]
            outputs = self._function(*held.fixed)
        GRAPHS.captured += 1
        GRAPHS.reserved_bytes += torch.cuda.memory_reserved(self._device) - before
        return _Graph(graph, held, outputs)
