"""How a prompt is read: in chunks, the first of what drafts as a graph.

A prompt takes a launch for every operation of every layer. A host needs longer for them than a
device does to read some hundred tokens into a small model, and for a drafter both are within what
is timed. So what drafts reads a prompt's first chunk as one graph, filled up to one of a few widths
with tokens that nobody sees: they stand behind all others, and what they leave in a cache lies
behind what is decided, where it is overwritten. Whether a graph stands or not, the chunk is filled
up, so its bits do not depend on what was captured. Later chunks come as they are, launched one by
one while the device still reads the first.

A target reads a prompt as it is and without graphs, whatever drafts for it: methods have the same
cache behind the same prompt, bit for bit, and it pays for no token that is not there.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from methods.fused import attends
from methods.graph import GRAPHS, Captured
from methods.kv import KVCache

# So that activations of a long prompt stay small.
PREFILL_CHUNK = 1024
# Rows that wide products are tiled by; at this step there are 8 widths.
PREFILL_STEP = 128


def chunks(start: int, end: int) -> Iterator[slice]:
    """Cut what is to be read, from `start` to `end`."""
    for first in range(start, end, PREFILL_CHUNK):
        yield slice(first, min(first + PREFILL_CHUNK, end))


def sent(tokens: Sequence[int], device: torch.device) -> Tensor:
    """Put tokens on a device, [n] int64, behind its work: a plain copy would wait for all of it."""
    held = torch.tensor(tokens, pin_memory=device.type == "cuda")
    return held.to(device, non_blocking=True)


class FirstChunk:
    """Reads the beginning of a prompt into an empty cache, as a graph where one was captured.

    step: tokens by which widths go up; 1 where there are no graphs, so that nothing is filled up.
    """

    def __init__(self, read: Callable[[Tensor], tuple[Tensor, ...]], kv: KVCache) -> None:
        """read: given [n] int64, writes n tokens behind what is decided, in order.

        It leaves the cache's length and scratch as they were.
        """
        self._graphed = attends(kv.data)
        self.step = PREFILL_STEP if self._graphed else 1
        self._kv = kv
        self._read = Captured(read, device=kv.data.device, graphed=self._graphed)
        self._captured: set[int] = set()

    def __call__(self, tokens: Sequence[int]) -> None:
        """Read a chunk of a prompt at most, and count it as decided."""
        assert self._kv.length == 0
        taken = tokens[:PREFILL_CHUNK]
        if taken:
            filled = torch.zeros(self._width(len(taken)), dtype=torch.int64)
            filled[: len(taken)] = torch.tensor(taken)
            self._read(filled)
            self._kv.advance(len(taken))

    def expect(self, lengths: Iterable[int]) -> None:
        """Capture the reads of prompts of these lengths; empties the cache where it does."""
        widths = {self._width(min(n, PREFILL_CHUNK)) for n in lengths if n > 0}
        if not self._graphed or widths <= self._captured:
            return
        self._kv.rewind(0)
        with GRAPHS.warm_up():
            for width in sorted(widths - self._captured, reverse=True):  # of one memory, the most
                self._read(torch.zeros(width, dtype=torch.int64))
        self._captured |= widths

    def _width(self, n: int) -> int:
        """Tokens that are read in place of n: whole steps, where cache and chunk have room."""
        return min(-(-n // self.step) * self.step, PREFILL_CHUNK, self._kv.capacity)
