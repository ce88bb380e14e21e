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

from methods.parcel import Parcel

Key = tuple[tuple[torch.Size, torch.dtype, bool], ...]
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
    """One capture, and the memory at the addresses that it knows.

    inputs: where a call's own go, in pinned memory those that come from the host. sent, arrived:
    these, in one pinned buffer and in the device's copy of it, which the graph itself makes.
    landed: pinned memory into which it copies the output that the host reads. ended: recorded
    behind the newest replay.
    """

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    sent: Parcel
    arrived: Parcel
    outputs: tuple[Tensor, ...]
    landed: Tensor | None
    device: torch.device
    ended: torch.cuda.Event  # noqa: TID251  orders, and times nothing

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.sent.parts:
            # The newest replay reads pinned memory when the device comes to it; only its end tells
            # that it has. In a step it has: each waits for its verification, and all that was
            # launched before that, and behind it comes one short commit. So this asks, and hardly
            # ever waits; it is what keeps callers right that wait for nothing.
            self.ended.synchronize()  # sync
        for given, fixed in zip(inputs, self.inputs, strict=True):
            if given is not fixed:
                fixed.copy_(given)
        self.graph.replay()
        self.ended.record(torch.cuda.current_stream(self.device))
        return self.outputs

    def fetch(self) -> Tensor:
        assert self.landed is not None
        self.ended.synchronize()  # sync
        return self.landed


class Captured:
    """A function of tensors, captured for each shape that it is warmed up with.

    The function must launch the same kernels for equal shapes, wait for nothing, and keep what it
    changes at fixed addresses. Inputs may lie on the host; a graph is for inputs that lie where
    those lay that it was captured with.

    All that crosses between host and device is part of the graph: one copy brings every host input,
    another takes one output back. So a call whose inputs all come from the host writes pinned
    memory and launches once; each other input is one copy more.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        *,
        device: torch.device,
        graphed: bool = True,
        fetched: int | None = None,
        borrows: bool = False,
    ) -> None:
        """graphed: False where the function cannot be captured; it is then called as it is.

        fetched: which of the outputs the host reads, by `fetch`. borrows: device inputs are read
        where they lay at the capture, as another's outputs always do for equal shapes; else they
        are copied, over what was borrowed too. The function must not write to them.
        """
        self._function = function
        self._device = device
        self._graphed = graphed and device.type == "cuda"
        self._fetched = fetched
        self._borrows = borrows
        self._graphs: dict[Key, _Graph] = {}
        self._newest: _Graph | Tensor | None = None

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Replay, or run where no graph of these shapes stands."""
        graph = self._graph(inputs) if self._graphed else None
        if graph is None:
            outputs = self._function(*(tensor.to(self._device) for tensor in inputs))
            self._newest = None if self._fetched is None else outputs[self._fetched]
            return outputs
        self._newest = graph
        return graph.replay(inputs)

    def fetch(self) -> Tensor:
        """Wait for the newest call, and for no later work, where it was a replay.

        Gives the output that the host reads, in host memory; it stands until the next call.
        """
        assert self._newest is not None
        if isinstance(self._newest, Tensor):
            return self._newest.cpu()  # sync
        return self._newest.fetch()

    def _graph(self, inputs: tuple[Tensor, ...]) -> _Graph | None:
        key = tuple([(tensor.shape, tensor.dtype, tensor.is_cuda) for tensor in inputs])
        graph = self._graphs.get(key)
        if graph is None:
            if GRAPHS.capturing:
                graph = self._graphs[key] = self._capture(inputs)
            else:
                GRAPHS.missed += 1
        return graph

    def _capture(self, inputs: tuple[Tensor, ...]) -> _Graph:
        torch.cuda.empty_cache()  # as a capture does, which would hide what it takes
        before = torch.cuda.memory_reserved(self._device)
        # Pinned memory is made here and lives as long as the graph: none may be asked for during a
        # capture, and what is freed would be given to others while the graph still knows it.
        hosts = [tensor for tensor in inputs if not tensor.is_cuda]
        sent = Parcel.like(hosts, torch.device("cpu"), pinned=True)
        for part, given in zip(sent.parts, hosts, strict=True):
            part.copy_(given)
        arrived = Parcel.like(hosts, self._device)
        arrived.whole.copy_(sent.whole)
        at_host, on_device = iter(sent.parts), iter(arrived.parts)
        own = [t if self._borrows or not t.is_cuda else t.clone() for t in inputs]
        fixed = [t if t.is_cuda else next(on_device) for t in own]
        landed = self._warm(fixed)
        if self._device not in _POOLS:
            _POOLS[self._device] = torch.cuda.MemPool()
        graph = torch.cuda.CUDAGraph()
        pool = _POOLS[self._device].id
        with torch.cuda.graph(graph, pool=pool):  # type: ignore[arg-type]
            if hosts:
                arrived.whole.copy_(sent.whole, non_blocking=True)
            outputs = self._function(*fixed)
            if landed is not None and self._fetched is not None:
                landed.copy_(outputs[self._fetched], non_blocking=True)
        GRAPHS.captured += 1
        GRAPHS.reserved_bytes += torch.cuda.memory_reserved(self._device) - before
        return _Graph(
            graph=graph,
            inputs=[t if t.is_cuda else next(at_host) for t in own],
            sent=sent,
            arrived=arrived,
            outputs=outputs,
            landed=landed,
            device=self._device,
            ended=torch.cuda.Event(),  # type: ignore[no-untyped-call]  # noqa: TID251
        )

    def _warm(self, fixed: list[Tensor]) -> Tensor | None:
        """Run before a capture; give pinned memory like the output that the host reads."""
        landed = None
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                outputs = self._function(*fixed)
                if self._fetched is not None and landed is None:
                    landed = torch.empty_like(outputs[self._fetched], device="cpu", pin_memory=True)
                del outputs
        torch.cuda.current_stream(self._device).wait_stream(side)
        return landed
